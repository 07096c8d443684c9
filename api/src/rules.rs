//! What admission refuses and warns of, as a function of values; the controller holds stored objects against the same.
//!
//! - [`RULES`]: the table of rules, from which [`document`] makes `docs/rules.md`.
//! - [`check`]: all findings on a binding, the most important first.
//! - [`Context`]: what was looked up for it, [`Settings`]: what the operator decided.
//!
//! A new rule is a row of the table, a check in `checks.rs`, an accepted and a refused case in `tests.rs`, and one in
//! `e2e/tests/admission.rs`; `make generate` writes the documentation.

mod checks;
mod table;
#[cfg(test)]
mod tests;

pub use table::{Occasion, RULES, RestsOn, Rule, document, reference, rule};

use crate::arn::TargetGroupArn;
use crate::defaulting;
use crate::service::Service;
use crate::target_group::{TargetGroup, TargetType};
use crate::text::{self, quoted};
use crate::v1::{Sharing, Spec, TargetGroupBinding, TargetGroupRef};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// The consequence of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object is refused.
    Deny,
    /// The user is warned.
    Warn,
    /// The finding is dropped.
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

/// The answer that a refusal gets.
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
    /// The fault of the value, and what would be right.
    pub message: String,
    /// The consequence.
    pub severity: Severity,
    /// The answer to a refusal.
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

/// The words of v1 in messages, and those of the older versions.
const SAID_TO_WRITE: [(&str, &str); 4] = [
    ("sharing: Shared", "multiClusterTargetGroup: true"),
    ("set assumeRole to", "set iamRoleArnToAssume to"),
    ("set roleARN", "set iamRoleArnToAssume"),
    ("set arn, targetType, protocol,", "set targetGroupARN, targetType, targetGroupProtocol,"),
];

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
    /// Number of targets that are registered and not draining (TGB119).
    pub registered: Option<usize>,
    /// Number of these that the binding does not register itself (TGB118).
    pub foreign: Option<usize>,
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
            format!(
                "{} is not a rule setting; write ID=deny, ID=warn or ID=off, as in TGB206=warn",
                quoted(text)
            )
        })?;
        let known =
            rule(id.trim()).ok_or_else(|| format!("there is no rule {}; see docs/rules.md", quoted(id)))?;
        let severity = [Severity::Deny, Severity::Warn, Severity::Off]
            .into_iter()
            .find(|s| s.as_str() == word.trim())
            .ok_or_else(|| format!("{} is not a severity; write deny, warn or off", quoted(word)))?;
        if known.on == Occasion::ServiceChange && severity == Severity::Deny {
            return Err(format!("{} never refuses; write warn or off", known.id));
        }
        self.severities.insert(known.id, severity);
        Ok(())
    }

    /// Refuses a rule that is softened here and enforced by the controller: what it let pass would be stalled there.
    ///
    /// # Errors
    /// A sentence for the operator.
    pub fn refuse_softened(&self) -> Result<(), String> {
        let softened = |(id, severity): (&&'static str, &Severity)| {
            let known = rule(id).filter(|rule| rule.enforced && *severity != Severity::Deny)?;
            Some(format!(
                "{}={}: the controller enforces {0} whatever the webhook says, so it can only be deny; see {}",
                known.id,
                severity.as_str(),
                reference(known.id)
            ))
        };
        self.severities.iter().find_map(softened).map_or(Ok(()), Err)
    }

    /// Reads one `KEY[=VALUE]` of `--require-target-group-tag`.
    pub fn require_tag(&mut self, text: &str) {
        let tag = match text.split_once('=') {
            Some((key, value)) => (key.to_owned(), Some(value.to_owned())),
            None => (text.to_owned(), None),
        };
        self.required_tags.push(tag);
    }

    /// True if the targets of a Shared binding may be kept in this namespace (TGB121).
    pub fn may_share(&self, namespace: &str) -> bool {
        let listed = |all: &Vec<String>| all.iter().any(|one| one == "*" || one == namespace);
        self.shared_namespaces.as_ref().is_none_or(listed)
    }

    /// Whether a rule needs the target group's tags.
    pub fn wants_tags(&self) -> bool {
        !self.required_tags.is_empty() || self.namespace_tag.is_some()
    }

    /// True if a role may be assumed (TGB402): one of the globs matches all of it.
    pub fn may_assume(&self, role_arn: &str) -> bool {
        role_arn.len() <= LONGEST_ROLE
            && self.assume_role_allow.iter().any(|glob| matches_glob(glob, role_arn))
    }

    /// True if AWS may be asked about a target group: ARN, name, role and external id have their forms (TGB102, TGB212),
    /// region and account are within reach (TGB103, TGB104), and the role is one that may be assumed, and of use (TGB401,
    /// TGB402).
    pub fn may_ask(&self, group: &TargetGroupRef) -> bool {
        let role = group.role();
        let role_is_fine = role.is_none_or(|role| {
            self.may_assume(role.role_arn) && group.target_type != Some(TargetType::Instance)
        });
        if !role_is_fine || faulty_names(group).next().is_some() {
            return false;
        }
        let Some(arn) = group.arn() else { return group.name().is_some() };
        let Ok(arn) = TargetGroupArn::parse(arn) else { return false };
        let account = role.map_or(self.account.as_deref(), |role| role_account(role.role_arn));
        self.region.as_deref().is_none_or(|region| region == arn.region())
            && self.partition.as_deref().is_none_or(|partition| partition == arn.partition())
            && account.is_none_or(|account| account == arn.account())
    }

    /// The consequence of a rule's finding, `default` being the rule's own.
    pub fn severity(&self, rule: &Rule, default: Severity) -> Severity {
        let set = self.severities.get(rule.id).copied().unwrap_or(default);
        match (set, rule.kind) {
            (Severity::Deny, Kind::Policy) if self.warn_only => Severity::Warn,
            _ => set,
        }
    }
}

/// The most findings of each severity that are kept.
pub const MOST_FINDINGS: usize = 50;
/// The most entries of a list in `networking` (TGB308). v1's schema has the same bound.
pub const MOST_ENTRIES: usize = 50;
/// AWS's bounds on what AssumeRole takes.
const LONGEST_ROLE: usize = 2048;
const EXTERNAL_ID: std::ops::RangeInclusive<usize> = 2..=1224;

/// Holds a binding against every rule. `old` is the stored object of an update.
///
/// Findings that are not switched off come back, refusals first, then in the order of their ids; of each severity at most
/// [`MOST_FINDINGS`], the last of which says how many more there are. Findings of rules that the controller enforces are
/// always among them.
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
    let checks::Look { mut found, dropped, .. } = look;
    found.sort_by(|a, b| (a.severity, a.rule).cmp(&(b.severity, b.rule)));
    for (severity, more) in dropped {
        let last = found.iter_mut().rfind(|finding| finding.severity == severity);
        last.into_iter().for_each(|last| last.message.push_str(&format!("; and {more} more")));
    }
    found
}

/// The account of a role's ARN; none if it is not one.
fn role_account(text: &str) -> Option<&str> {
    let mut parts = text.splitn(6, ':');
    let mut next = || parts.next();
    let [arn, partition, iam, region, account, resource] =
        [next()?, next()?, next()?, next()?, next()?, next()?];
    let is_one = arn == "arn"
        && partition.starts_with("aws")
        && iam == "iam"
        && region.is_empty()
        && account.len() == 12
        && account.bytes().all(|b| b.is_ascii_digit())
        && resource
            .strip_prefix("role/")
            .is_some_and(|name| !name.is_empty() && !name.contains(char::is_whitespace));
    is_one.then_some(account)
}

/// The names of a target group that have not their form: path and message. A name beside an ARN is looked at too.
fn faulty_names(group: &TargetGroupRef) -> impl Iterator<Item = (&'static str, String)> {
    let name = group.name().filter(|name| !text::is_target_group_name(name)).map(|name| {
        let message = format!(
            "{} is not the name of a target group; it has 1 to 32 letters, digits and hyphens, none of these at an end",
            quoted(name)
        );
        ("spec.targetGroup.name", message)
    });
    let role = group.role();
    let long = role.filter(|role| role.role_arn.len() > LONGEST_ROLE).map(|role| {
        let message = format!(
            "{} has {} characters, the ARN of a role at most {LONGEST_ROLE}",
            quoted(role.role_arn),
            role.role_arn.chars().count()
        );
        ("spec.targetGroup.assumeRole.roleARN", message)
    });
    let external_id = role.and_then(|role| role.external_id).map(|id| id.chars().count());
    let external_id = external_id.filter(|length| !EXTERNAL_ID.contains(length)).map(|length| {
        let message = format!(
            "the external id has {length} characters; AWS takes {} to {}",
            EXTERNAL_ID.start(),
            EXTERNAL_ID.end()
        );
        ("spec.targetGroup.assumeRole.externalID", message)
    });
    name.into_iter().chain(long).chain(external_id)
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
            "could not complete the manifest from AWS ({reason}); try again, or set arn, targetType, protocol, ipAddressType \
             and vpcID yourself"
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
