//! Annotations of ours on a binding. Admission, lint and the controller read them here, so that a value means the same to
//! each of them.
//!
//! A value that is not one of the known words never loosens anything: it counts as the choice that loses no traffic and
//! touches nothing of others. [`Options::of`] returns such values and keys, for warnings.

use crate::names;
use crate::target_group::words;
use crate::v1::TargetGroupBinding;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The choices that a binding's annotations make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// [`names::PAUSED`]: nothing is changed in AWS.
    pub paused: bool,
    /// [`names::ON_DELETE`].
    pub on_delete: OnDelete,
    /// [`names::ADOPT_TARGETS`]: targets that something else registered may be deregistered.
    pub adopt_targets: bool,
    /// [`names::RELEASE`]: the finalizer goes even though clean-up fails.
    pub release: bool,
    /// [`names::NODE_PORT_MISMATCH`]; absent: rule TGB206 refuses.
    pub node_port_mismatch: Option<NodePortMismatch>,
    /// [`names::WHEN_NONE_READY`]; absent: `--keep-last-targets` decides.
    pub when_none_ready: Option<WhenNoneReady>,
}

words! {
    /// The effect of deletion in AWS.
    OnDelete {
        /// Deregisters the binding's targets and revokes its rules.
        Deregister = "deregister",
        /// Leaves targets and rules as they are.
        Retain = "retain",
    }
}

words! {
    /// The weight of rule TGB206.
    NodePortMismatch {
        /// A warning.
        Warn = "warn",
        /// Nothing.
        Ignore = "ignore",
    }
}

words! {
    /// The fate of the last targets when no endpoint is ready although pods run.
    WhenNoneReady {
        /// They stay.
        Keep = "keep",
        /// They go.
        Deregister = "deregister",
    }
}

/// An annotation that we know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Known {
    /// Its key.
    pub key: &'static str,
    /// The words that it takes, in any case.
    pub values: &'static [&'static str],
    /// The effect of any other value, as in `an unknown value counts as …`.
    pub otherwise: &'static str,
}

/// Every annotation that we read.
pub const KNOWN: &[Known] = &[
    Known { key: names::PAUSED, values: BOOLEAN, otherwise: "true" },
    Known { key: names::ON_DELETE, values: &["deregister", "retain"], otherwise: "retain" },
    Known { key: names::ADOPT_TARGETS, values: BOOLEAN, otherwise: "false" },
    Known { key: names::RELEASE, values: BOOLEAN, otherwise: "false" },
    Known { key: names::NODE_PORT_MISMATCH, values: &["warn", "ignore"], otherwise: "absent" },
    Known { key: names::WHEN_NONE_READY, values: &["keep", "deregister"], otherwise: "keep" },
];

const BOOLEAN: &[&str] = &["true", "false"];

/// Keys of our group that others write on bindings. They mean nothing to us.
const OF_OTHERS: [&str; 2] = ["elbv2.k8s.aws/checkpoint", "elbv2.k8s.aws/checkpoint-timestamp"];

/// An annotation of our group that we can't take as it is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownOption<'a> {
    /// A key that we don't know, probably a typo.
    Key(&'a str),
    /// A value that we don't know.
    Value {
        /// The annotation.
        known: &'static Known,
        /// Its value.
        value: &'a str,
    },
}

impl UnknownOption<'_> {
    /// The annotation's key.
    pub fn key(&self) -> &str {
        match self {
            Self::Key(key) => key,
            Self::Value { known, .. } => known.key,
        }
    }
}

/// A sentence for the user.
impl fmt::Display for UnknownOption<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(key) => {
                let names: Vec<&str> = KNOWN.iter().map(|known| name_of(known.key)).collect();
                let key: String = key.chars().take(MOST_SHOWN).collect();
                write!(
                    f,
                    "{key} is not an annotation of ours; after {}/ there may be {}",
                    names::GROUP,
                    names.join(", ")
                )
            }
            Self::Value { known: Known { key, values, otherwise }, value } => {
                let value: String = value.chars().take(MOST_SHOWN).collect();
                write!(
                    f,
                    "{value:?} is not a value of {key}; write {}; it counts as {otherwise}",
                    values.join(" or ")
                )
            }
        }
    }
}

/// Characters of a user's text in a sentence.
const MOST_SHOWN: usize = 64;

impl Options {
    /// Reads the annotations, and names those that can't be taken as they are written.
    pub fn of(binding: &TargetGroupBinding) -> (Self, Vec<UnknownOption<'_>>) {
        let mut unknown = Vec::new();
        let annotations = binding.metadata.annotations.iter().flatten();
        for (key, value) in annotations.filter(|(key, _)| is_ours(key)) {
            match KNOWN.iter().find(|known| known.key == key) {
                Some(known) if known.values.contains(&word(value).as_str()) => {}
                Some(known) => unknown.push(UnknownOption::Value { known, value }),
                None if OF_OTHERS.contains(&key.as_str()) => {}
                None => unknown.push(UnknownOption::Key(key)),
            }
        }
        let text = |key: &str| binding.metadata.annotations.as_ref()?.get(key).map(|text| word(text));
        let options = Self {
            paused: text(names::PAUSED).is_some_and(|text| text != "false"),
            on_delete: text(names::ON_DELETE)
                .map_or(OnDelete::Deregister, |text| OnDelete::from_word(&text).unwrap_or(OnDelete::Retain)),
            adopt_targets: text(names::ADOPT_TARGETS).is_some_and(|text| text == "true"),
            release: text(names::RELEASE).is_some_and(|text| text == "true"),
            node_port_mismatch: text(names::NODE_PORT_MISMATCH)
                .and_then(|text| NodePortMismatch::from_word(&text)),
            when_none_ready: text(names::WHEN_NONE_READY)
                .map(|text| WhenNoneReady::from_word(&text).unwrap_or(WhenNoneReady::Keep)),
        };
        (options, unknown)
    }
}

/// True for an annotation of our group.
pub fn is_ours(key: &str) -> bool {
    key.split_once('/').is_some_and(|(group, _)| group == names::GROUP)
}

/// A value without what nobody means by it: blanks around it, and the case of its letters.
fn word(value: &str) -> String {
    value.trim().to_ascii_lowercase()
}

fn name_of(key: &str) -> &str {
    key.split_once('/').map_or(key, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn binding(annotations: &[(&str, &str)]) -> TargetGroupBinding {
        let annotations: std::collections::BTreeMap<&str, &str> = annotations.iter().copied().collect();
        serde_json::from_value(json!({"metadata": {"annotations": annotations}})).unwrap()
    }

    fn options(annotations: &[(&str, &str)]) -> (Options, Vec<String>) {
        let binding = binding(annotations);
        let (options, unknown) = Options::of(&binding);
        (options, unknown.iter().map(|unknown| unknown.key().to_owned()).collect())
    }

    const NONE: Options = Options {
        paused: false,
        on_delete: OnDelete::Deregister,
        adopt_targets: false,
        release: false,
        node_port_mismatch: None,
        when_none_ready: None,
    };

    #[test]
    fn each_annotation_takes_its_words_in_any_case_and_others_count_as_the_safe_choice() {
        use names::*;
        let retain = Options { on_delete: OnDelete::Retain, ..NONE };
        let paused = Options { paused: true, ..NONE };
        let adopts = Options { adopt_targets: true, ..NONE };
        let released = Options { release: true, ..NONE };
        let mismatch = |found| Options { node_port_mismatch: Some(found), ..NONE };
        let none_ready = |found| Options { when_none_ready: Some(found), ..NONE };
        let cases = [
            (PAUSED, "true", paused, true),
            (PAUSED, "True", paused, true),
            (PAUSED, "False", NONE, true),
            (PAUSED, "yes", paused, false),
            (PAUSED, "", paused, false),
            (ON_DELETE, "retain", retain, true),
            (ON_DELETE, "Retain ", retain, true),
            (ON_DELETE, "deregister", NONE, true),
            (ON_DELETE, "keep", retain, false),
            (ON_DELETE, "", retain, false),
            (ADOPT_TARGETS, "TRUE", adopts, true),
            (ADOPT_TARGETS, "false", NONE, true),
            (ADOPT_TARGETS, "1", NONE, false),
            (RELEASE, "True", released, true),
            (RELEASE, "false", NONE, true),
            (RELEASE, "yes", NONE, false),
            (NODE_PORT_MISMATCH, "Warn", mismatch(NodePortMismatch::Warn), true),
            (NODE_PORT_MISMATCH, "ignore", mismatch(NodePortMismatch::Ignore), true),
            (NODE_PORT_MISMATCH, "ingore", NONE, false),
            (WHEN_NONE_READY, "KEEP", none_ready(WhenNoneReady::Keep), true),
            (WHEN_NONE_READY, "deregister", none_ready(WhenNoneReady::Deregister), true),
            (WHEN_NONE_READY, "remove", none_ready(WhenNoneReady::Keep), false),
        ];
        for (key, value, want, is_known) in cases {
            let (found, unknown) = options(&[(key, value)]);
            assert_eq!(found, want, "{key}: {value:?}");
            assert_eq!(unknown.is_empty(), is_known, "{key}: {value:?}");
        }
        for known in KNOWN {
            assert!(
                cases.iter().any(|(key, _, _, is_known)| *key == known.key && !is_known),
                "{}",
                known.key
            );
        }
        assert_eq!(options(&[]), (NONE, vec![]));
    }

    #[test]
    fn keys_of_our_group_that_we_do_not_know_are_named_and_those_of_others_are_not() {
        let (found, unknown) = options(&[
            ("elbv2.k8s.aws/onDelete", "retain"),
            ("elbv2.k8s.aws/checkpoint", "x/y"),
            ("elbv2.k8s.aws/checkpoint-timestamp", "1"),
            ("example.com/paused", "true"),
            ("paused", "true"),
        ]);
        assert_eq!((found, unknown), (NONE, vec!["elbv2.k8s.aws/onDelete".to_owned()]));
    }

    #[test]
    fn a_sentence_names_the_words_that_there_are_and_holds_little_of_the_users_text() {
        let long = "x".repeat(1000);
        let binding = binding(&[(names::ON_DELETE, &long), ("elbv2.k8s.aws/pause", "true")]);
        let (_, unknown) = Options::of(&binding);
        let said: Vec<String> = unknown.iter().map(ToString::to_string).collect();
        let cut = "x".repeat(64);
        let value = format!(
            "{cut:?} is not a value of elbv2.k8s.aws/on-delete; write deregister or retain; it counts as retain"
        );
        assert_eq!(said[0], value);
        assert_eq!(
            said[1],
            "elbv2.k8s.aws/pause is not an annotation of ours; after elbv2.k8s.aws/ there may be paused, on-delete, \
             adopt-targets, release, node-port-mismatch, when-none-ready"
        );
    }

    #[test]
    fn every_annotation_and_its_words_are_on_the_page() {
        let page = include_str!("../../docs/annotations.md");
        for Known { key, values, .. } in KNOWN {
            let row = page.lines().find(|line| line.starts_with(&format!("| `{key}`")));
            let row = row.unwrap_or_else(|| panic!("docs/annotations.md lacks {key}"));
            assert!(values.iter().all(|value| row.contains(&format!("`{value}`"))), "{row}");
        }
    }
}
