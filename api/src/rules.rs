//! What admission refuses and warns of, as a function of values; the controller holds stored objects against the same.
//!
//! - [`RULES`]: the table of rules, from which [`document`] makes `docs/rules.md`.
//! - [`check`]: all findings on a binding, the most important first.
//! - [`Context`]: what was looked up for it, [`Settings`]: what the operator decided.
//! - [`FROZEN`]: the rules that the controller enforces too, since a webhook can be bypassed.

mod checks;
mod table;
#[cfg(test)]
mod tests;

pub use table::{FROZEN, RULES, Rule, document, rule};

use crate::defaulting;
use crate::service::Service;
use crate::target_group::TargetGroup;
use crate::v1::{Sharing, Spec, TargetGroupBinding};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// What a finding leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is refused.
    Deny,
    /// The user is warned.
    Warn,
    /// Nothing.
    Off,
}

impl Severity {
    /// The word of `--rules`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Warn => "warn",
            Self::Off => "off",
        }
    }
}

/// What a rule rests on: the object alone, or what is around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The object's own shape; a refusal is `422 Invalid`.
    Shape,
    /// The cluster, AWS or the operator's settings; a refusal is `403 Forbidden`, and `--enforce=warn` softens it.
    Policy,
}

/// Something that is wrong with a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The rule's id, as in `TGB204`.
    pub rule: &'static str,
    /// The field, as v1 names it; see [`path_in`].
    pub path: String,
    /// What is wrong with the value, and what would be right.
    pub message: String,
    /// What it leads to.
    pub severity: Severity,
    /// What the rule rests on.
    pub kind: Kind,
}

impl Finding {
    /// `PATH: ID MESSAGE`, with the path, and what the message says to write, in the version that the user speaks (`v1`, `v1beta1`, `v1alpha1`).
    pub fn in_version(&self, version: &str) -> String {
        format!("{}: {} {}", path_in(version, &self.path), self.rule, self.message_in(version))
    }

    /// The message in that version.
    pub fn message_in(&self, version: &str) -> Cow<'_, str> {
        if version == "v1" {
            return self.message.as_str().into();
        }
        let said = |text: String, (v1, old): &(&str, &str)| {
            if text.contains(v1) { text.replace(v1, old) } else { text }
        };
        SAID_TO_WRITE.iter().fold(self.message.clone(), said).into()
    }
}

/// What messages say to write in v1, and in the older versions.
const SAID_TO_WRITE: [(&str, &str); 4] = [
    ("sharing: Shared", "multiClusterTargetGroup: true"),
    ("set assumeRole to", "set iamRoleArnToAssume to"),
    ("set roleARN", "set iamRoleArnToAssume"),
    ("write arn, targetType, protocol,", "write targetGroupARN, targetType, targetGroupProtocol,"),
];
const COMPLETE_IT: &str = "write arn, targetType, protocol, ipAddressType and vpcID yourself";

/// Why admission is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A new object; the controller's look at a stored one is the same.
    Create,
    /// A change of an object: a rule looks only if a field that it looks at changed.
    Update,
}

/// The result of looking something up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lookup<T> {
    /// Nobody looked, or there was no answer: nothing can be said.
    #[default]
    Unknown,
    /// It is not there.
    Missing,
    /// It is there.
    Found(T),
}

impl<T> Lookup<T> {
    /// The value, if it was found.
    pub fn found(self) -> Option<T> {
        match self {
            Self::Found(value) => Some(value),
            Self::Unknown | Self::Missing => None,
        }
    }
}

/// Another binding of the same target group; the one that is checked, and terminating ones, are left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Other {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its sharing.
    pub sharing: Sharing,
}

/// What was looked up for a binding. The default knows nothing, so that only rules about shape and settings speak.
#[derive(Debug, Clone, Copy, Default)]
pub struct Context<'a> {
    /// The Service of `serviceRef`.
    pub service: Lookup<&'a Service>,
    /// The target group of `arn`, or of `name` where there is no `arn`.
    pub target_group: Lookup<&'a TargetGroup>,
    /// The target group that `name` means, where `arn` is set too (TGB105).
    pub named: Lookup<&'a TargetGroup>,
    /// The target group's tags (TGB403, TGB404).
    pub tags: Option<&'a BTreeMap<String, String>>,
    /// How many targets are registered and not draining (TGB118, TGB119).
    pub registered: Option<usize>,
    /// Bindings of the same target group (TGB115); `None` when they are not known.
    pub others: Option<&'a [Other]>,
    /// Whether the namespace asks for readiness gates (TGB107).
    pub injects: Option<bool>,
}

/// What the operator decided. The default decides nothing and knows no account.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The controller's region.
    pub region: Option<String>,
    /// The controller's partition.
    pub partition: Option<String>,
    /// The controller's account.
    pub account: Option<String>,
    /// Globs of roles that may be assumed; empty: none may.
    pub assume_role_allow: Vec<String>,
    /// Tags that every target group must carry: key, and value unless any will do.
    pub required_tags: Vec<(String, Option<String>)>,
    /// The tag that lists the namespaces which may bind a target group.
    pub namespace_tag: Option<String>,
    /// Namespaces that may have Shared bindings, `*` being all; `None`: nobody asks (TGB121).
    pub shared_namespaces: Option<Vec<String>>,
    /// Severities that differ from the table's.
    pub severities: BTreeMap<&'static str, Severity>,
    /// `--enforce=warn`: refusals of policy become warnings.
    pub warn_only: bool,
}

impl Settings {
    /// As the flags about tenants say: `--assume-role-allow`, `--require-target-group-tag`, `--namespace-binding-tag`. An
    /// environment variable that is set to nothing gives an empty text, which counts as none.
    pub fn of_tenants(roles: &[String], tags: &[String], namespace_tag: Option<&str>) -> Self {
        let mut settings = Self {
            assume_role_allow: given(roles).cloned().collect(),
            namespace_tag: namespace_tag.filter(|tag| !tag.is_empty()).map(str::to_owned),
            ..Self::default()
        };
        given(tags).for_each(|tag| settings.require_tag(tag));
        settings
    }

    /// Reads `--rules`; an empty text counts as none.
    ///
    /// # Errors
    /// As [`Self::set_rule`].
    pub fn set_rules(&mut self, texts: &[String]) -> Result<(), String> {
        given(texts).try_for_each(|text| self.set_rule(text))
    }

    /// Reads one `ID=deny|warn|off` of `--rules`.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn set_rule(&mut self, text: &str) -> Result<(), String> {
        let (id, word) = text.trim().split_once('=').ok_or_else(|| {
            format!("{text:?} is no rule setting; write ID=deny, ID=warn or ID=off, as in TGB206=warn")
        })?;
        let known = rule(id.trim()).ok_or_else(|| format!("there is no rule {id:?}; see docs/rules.md"))?;
        let severity = [Severity::Deny, Severity::Warn, Severity::Off]
            .into_iter()
            .find(|s| s.as_str() == word.trim())
            .ok_or_else(|| format!("{word:?} is no severity; write deny, warn or off"))?;
        if known.on == "S" && severity == Severity::Deny {
            return Err(format!("{} never refuses; write warn or off", known.id));
        }
        self.severities.insert(known.id, severity);
        Ok(())
    }

    /// Reads one `KEY[=VALUE]` of `--require-target-group-tag`.
    pub fn require_tag(&mut self, text: &str) {
        let tag = match text.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (text.to_owned(), None),
        };
        self.required_tags.push(tag);
    }

    /// Whether the targets of a Shared binding may be kept in this namespace (TGB121).
    pub fn may_share(&self, namespace: &str) -> bool {
        let listed = |all: &Vec<String>| all.iter().any(|one| one == "*" || one == namespace);
        self.shared_namespaces.as_ref().is_none_or(listed)
    }

    /// Whether a rule needs the target group's tags.
    pub fn wants_tags(&self) -> bool {
        !self.required_tags.is_empty() || self.namespace_tag.is_some()
    }

    /// Whether a role may be assumed (TGB402): one of the globs matches all of it, or the operator switched the rule off.
    pub fn may_assume(&self, role_arn: &str) -> bool {
        self.severities.get("TGB402") == Some(&Severity::Off)
            || self.assume_role_allow.iter().any(|glob| matches_glob(glob, role_arn))
    }

    /// What a finding of a rule leads to, `default` being what the rule itself says.
    pub fn severity(&self, rule: &Rule, default: Severity) -> Severity {
        let set = self.severities.get(rule.id).copied().unwrap_or(default);
        match (set, rule.kind) {
            (Severity::Deny, Kind::Policy) if self.warn_only => Severity::Warn,
            _ => set,
        }
    }
}

/// Holds a binding against every rule. `old` is the stored object of an update.
///
/// All findings that are not switched off come back, refusals first, then in the order of their ids.
pub fn check(
    operation: Operation,
    new: &TargetGroupBinding,
    old: Option<&TargetGroupBinding>,
    context: &Context<'_>,
    settings: &Settings,
) -> Vec<Finding> {
    let before = old.map(|old| completed(old, new, context));
    let before = before.as_deref();
    let mut look = checks::Look::new(operation, new, old, before, context, settings);
    look.run();
    let mut found = look.found;
    found.sort_by(|a, b| (a.severity, a.rule).cmp(&(b.severity, b.rule)));
    found
}

fn given(texts: &[String]) -> impl Iterator<Item = &String> {
    texts.iter().filter(|text| !text.is_empty())
}

/// The stored spec with what defaulting fills into it, as it does into the new one: an object that was stored before
/// there was anybody to fill it in stays editable.
fn completed<'a>(
    old: &'a TargetGroupBinding,
    new: &TargetGroupBinding,
    context: &Context<'_>,
) -> Cow<'a, Spec> {
    let (was, is) = (&old.spec.target_group, &new.spec.target_group);
    let group = context.target_group.found().filter(|group| match was.arn() {
        Some(was) => is.arn() == Some(was),
        None => was.name() == is.name() && was.name() == Some(group.arn.name()),
    });
    let is_same = old.spec.service_ref.name == new.spec.service_ref.name;
    let service = context.service.found().filter(|_| is_same);
    match defaulting::from_lookups(old, group, service).as_slice() {
        [] => Cow::Borrowed(&old.spec),
        additions => {
            let mut spec = old.spec.clone();
            defaulting::apply(&mut spec, additions);
            Cow::Owned(spec)
        }
    }
}

/// A finding of TGB601: AWS did not answer. `needed`: without the answer the object can't be completed.
pub fn aws_unavailable(
    path: &str,
    reason: &str,
    needed: bool,
    admit: bool,
    settings: &Settings,
) -> Option<Finding> {
    let rule = rule("TGB601")?;
    let severity = match settings.severities.get(rule.id) {
        Some(Severity::Off) if !needed => return None,
        Some(Severity::Warn) if !needed => Severity::Warn,
        _ if settings.warn_only => Severity::Warn,
        Some(Severity::Deny) => Severity::Deny,
        _ if needed || !admit => Severity::Deny,
        _ => Severity::Warn,
    };
    let message = if needed {
        format!(
            "AWS is needed to fill in what the manifest leaves out, and did not answer: {reason}; try again, or {COMPLETE_IT}"
        )
    } else {
        format!("not checked against AWS: {reason}")
    };
    Some(Finding { rule: rule.id, path: path.to_owned(), message, severity, kind: rule.kind })
}

/// A path of v1 as another version writes it.
pub fn path_in(version: &str, path: &str) -> String {
    if version == "v1" {
        return path.to_owned();
    }
    let Some(rest) = path.strip_prefix("spec.targetGroup") else { return path.to_owned() };
    let field = match rest {
        ".arn" | "" => "targetGroupARN",
        ".name" => "targetGroupName",
        ".targetType" => "targetType",
        ".protocol" => "targetGroupProtocol",
        ".ipAddressType" => "ipAddressType",
        ".vpcID" => "vpcID",
        ".sharing" => "multiClusterTargetGroup",
        ".assumeRole" | ".assumeRole.roleARN" => "iamRoleArnToAssume",
        ".assumeRole.externalID" => "assumeRoleExternalId",
        _ => return path.to_owned(),
    };
    format!("spec.{field}")
}

/// Whether all of `text` matches `glob`, where `*` is any run of characters, `:` and `/` included.
fn matches_glob(glob: &str, text: &str) -> bool {
    let mut parts = glob.split('*');
    let Some(mut rest) = text.strip_prefix(parts.next().unwrap_or_default()) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some((_, after)) = rest.split_once(part) else { return false };
        rest = after;
    }
    rest.ends_with(last)
}
