//! The status of a binding: conditions with reasons for machines and sentences for people.

use crate::reason::{EventReason, Kind, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use std::sync::Arc;
use std::time::Duration;
use tgb_api::v1::{Condition, FirstContact, Said, Status, TargetCounts, TargetGroupBinding};

/// The types in the order in which `Ready` takes over the first that is false.
const ORDER: [Kind; 4] =
    [Kind::TargetGroupResolved, Kind::BackendResolved, Kind::TargetsRegistered, Kind::NetworkingReady];

/// How a condition stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    True,
    False,
    Unknown,
}

impl Verdict {
    const fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

/// The kinds of a backend that leads to nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Empty {
    /// It led to something before: it was scaled to zero, which is not a mistake.
    ScaledDown,
    /// It is new, and may lead to something within this time.
    New(Duration),
    /// It never led to anything, or only a person can change that.
    Wrong,
    /// Something is there, and is not ready.
    Unready,
}

/// The kind of an empty backend, by the reason and the status that stands there. Users scale to zero every day, and tools that
/// wait for `Ready` must not take that for a failure; a selector that never selected anything is one. `patience` is the time
/// that a new binding has, `now` is in seconds since the epoch.
pub(crate) fn empty(
    reason: Reason,
    old: Option<&Status>,
    binding: &TargetGroupBinding,
    patience: Duration,
    now: i64,
) -> Empty {
    match reason {
        Reason::BackendUnready => return Empty::Unready,
        Reason::NoMatchingPods | Reason::NoEndpoints => {}
        _ => return Empty::Wrong,
    }
    let had_some = |condition: &Condition| {
        *condition.type_ == *Kind::BackendResolved.as_str()
            && *condition.status == *Verdict::True.as_str()
            && condition.observed_generation == binding.metadata.generation
    };
    if old.is_some_and(|old| old.conditions.iter().any(had_some)) {
        return Empty::ScaledDown;
    }
    let created = binding.metadata.creation_timestamp.as_ref().map(|time| time.0.as_second());
    let age = created.and_then(|created| u64::try_from(now - created).ok()).map(Duration::from_secs);
    let left = age.and_then(|age| patience.checked_sub(age)).filter(|left| !left.is_zero());
    left.map_or(Empty::Wrong, Empty::New)
}

/// One finding of a pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) kind: Kind,
    pub(crate) verdict: Verdict,
    pub(crate) reason: Reason,
    pub(crate) message: String,
    /// Only a person can help.
    pub(crate) stalled: bool,
}

/// What a pass found out.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Report {
    pub(crate) findings: Vec<Finding>,
    pub(crate) target_group_arn: Option<String>,
    pub(crate) targets: Option<TargetCounts>,
    /// The first contact with the target group, if this pass knows of it.
    pub(crate) first_contact: Option<Box<FirstContact>>,
    /// Causes of events beside what the conditions say.
    pub(crate) notes: Vec<(EventReason, Reason, String)>,
    /// The binding is being deleted: what was said of it before stays.
    pub(crate) ends: bool,
    /// A clean-up that failed, and why.
    pub(crate) cleanup_failed: Option<String>,
    /// Rules of security groups that nobody wants and that could not be taken away: why, and a sentence.
    pub(crate) stale_rules: Option<(Reason, String)>,
}

impl Report {
    pub(crate) fn ok(&mut self, kind: Kind, reason: Reason, message: impl Into<String>) {
        self.put(kind, Verdict::True, reason, message.into(), false);
    }

    pub(crate) fn bad(&mut self, kind: Kind, reason: Reason, message: impl Into<String>) {
        self.put(kind, Verdict::False, reason, message.into(), false);
    }

    /// As [`Self::bad`], where waiting does not help.
    pub(crate) fn stalled(&mut self, kind: Kind, reason: Reason, message: impl Into<String>) {
        self.put(kind, Verdict::False, reason, message.into(), true);
    }

    pub(crate) fn unknown(&mut self, kind: Kind, reason: Reason, message: impl Into<String>) {
        self.put(kind, Verdict::Unknown, reason, message.into(), false);
    }

    /// The first finding wins.
    fn put(&mut self, kind: Kind, verdict: Verdict, reason: Reason, message: String, stalled: bool) {
        if !self.findings.iter().any(|finding| finding.kind == kind) {
            self.findings.push(Finding { kind, verdict, reason, message, stalled });
        }
    }

    fn find(&self, kind: Kind) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.kind == kind)
    }

    /// What `Ready` says: the first condition that is false, else the first that is not known.
    pub(crate) fn ready(&self) -> (Verdict, Reason, String) {
        if let Some(cause) = &self.cleanup_failed {
            return (Verdict::False, Reason::CleanupFailed, cause.clone());
        }
        let mut in_order = ORDER.iter().map(|kind| (kind, self.find(*kind)));
        let first = |verdict| {
            let mut found = ORDER.iter().filter_map(|kind| self.find(*kind));
            found.find(|finding| finding.verdict == verdict)
        };
        if let Some(finding) = first(Verdict::False) {
            return (Verdict::False, finding.reason, finding.message.clone());
        }
        match in_order.find(|(_, finding)| finding.is_none_or(|found| found.verdict == Verdict::Unknown)) {
            Some((_, Some(finding))) => (Verdict::Unknown, finding.reason, finding.message.clone()),
            Some((kind, None)) => (Verdict::Unknown, Reason::Pending, format!("{kind} is not known yet")),
            None => {
                let backend = self.find(Kind::BackendResolved);
                match backend.filter(|finding| finding.reason != Reason::Resolved) {
                    Some(finding) => (Verdict::True, finding.reason, finding.message.clone()),
                    None => {
                        let message = "the target group is as the binding says".to_owned();
                        (Verdict::True, Reason::Reconciled, message)
                    }
                }
            }
        }
    }
}

/// The status to write, given the one that stands there. Times change only where a condition's status does, so that an
/// equal status is equal.
pub(crate) fn status(report: &Report, old: Option<&Status>, generation: Option<i64>, now: Time) -> Status {
    let old_conditions = old.map(|status| status.conditions.as_slice()).unwrap_or_default();
    let mut conditions: Vec<Condition> = Vec::new();
    let mut put = |kind: Kind, verdict: Verdict, reason: Reason, message: &str| {
        let before = old_conditions.iter().find(|condition| *condition.type_ == *kind.as_str());
        let last_transition_time = before
            .filter(|before| *before.status == *verdict.as_str())
            .map_or_else(|| now.clone(), |before| before.last_transition_time.clone());
        conditions.push(Condition {
            said: Arc::new(Said {
                type_: kind.as_str().into(),
                status: verdict.as_str().into(),
                reason: reason.as_str().into(),
                message: shortened(message),
            }),
            observed_generation: generation,
            last_transition_time,
        });
    };
    for kind in ORDER {
        match report.find(kind) {
            Some(finding) => put(kind, finding.verdict, finding.reason, &finding.message),
            None if report.ends => {}
            None => put(kind, Verdict::Unknown, Reason::Pending, "not looked at yet"),
        }
    }
    let (verdict, reason, message) = report.ready();
    if !report.ends || report.cleanup_failed.is_some() {
        put(Kind::Ready, verdict, reason, &message);
    }
    if let Some(finding) = report.findings.iter().find(|finding| finding.stalled) {
        put(Kind::Stalled, Verdict::True, finding.reason, &finding.message);
    }
    if let Some(cause) = &report.cleanup_failed {
        put(Kind::CleanupFailed, Verdict::True, Reason::CleanupFailed, cause);
    }
    let extra = [Kind::Ready, Kind::Stalled, Kind::CleanupFailed];
    let ours = |name: &str| ORDER.iter().chain(&extra).any(|kind| kind.as_str() == name);
    let is_there =
        |all: &[Condition], name: &str| all.iter().any(|condition: &Condition| *condition.type_ == *name);
    let kept = old_conditions.iter().filter(|condition| {
        let name = &*condition.type_;
        !is_there(&conditions, name) && (!ours(name) || (report.ends && name != Kind::CleanupFailed.as_str()))
    });
    let kept: Vec<Condition> = kept.cloned().collect();
    conditions.extend(kept);
    Status {
        observed_generation: generation,
        target_group_arn: report
            .target_group_arn
            .as_deref()
            .map(Arc::from)
            .or_else(|| old.and_then(|status| status.target_group_arn.clone())),
        conditions,
        targets: report.targets.clone().or_else(|| old.and_then(|status| status.targets.clone())),
        first_contact: report
            .first_contact
            .clone()
            .or_else(|| old.and_then(|status| status.first_contact.clone())),
    }
}

/// How a status differs from the one that stands there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Difference {
    None,
    /// In counts, or in what is said of what is well.
    Counts,
    /// In what is said of what is not well, for the same reasons.
    Words,
    Substance,
}

/// Compares. When AWS was last asked makes no difference.
pub(crate) fn difference(old: Option<&Status>, new: &Status) -> Difference {
    let Some(old) = old else { return Difference::Substance };
    fn substance(all: &[Condition]) -> impl Iterator<Item = (&str, &str, &str, Option<i64>)> {
        all.iter().map(|one| (&*one.type_, &*one.status, &*one.reason, one.observed_generation))
    }
    let counts =
        |status: &Status| status.targets.clone().map(|counts| TargetCounts { observed_at: None, ..counts });
    if (old.observed_generation, &old.target_group_arn) != (new.observed_generation, &new.target_group_arn)
        || old.first_contact != new.first_contact
        || !substance(&old.conditions).eq(substance(&new.conditions))
    {
        Difference::Substance
    } else if old
        .conditions
        .iter()
        .zip(&new.conditions)
        .any(|(old, new)| *new.status != *Verdict::True.as_str() && old.message != new.message)
    {
        Difference::Words
    } else if old.conditions != new.conditions || counts(old) != counts(new) {
        Difference::Counts
    } else {
        Difference::None
    }
}

/// Conditions hold 32 KiB; people read a few lines.
fn shortened(message: &str) -> Arc<str> {
    const MOST: usize = 1024;
    if message.chars().count() <= MOST {
        return message.into();
    }
    message.chars().take(MOST).chain(['…']).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::jiff::Timestamp;

    fn at(second: i64) -> Time {
        Time(Timestamp::from_second(second).unwrap())
    }

    fn good() -> Report {
        let mut report = Report::default();
        for kind in ORDER {
            report.ok(kind, Reason::Resolved, "fine");
        }
        report
    }

    fn ready(status: &Status) -> (&str, &str) {
        let ready =
            status.conditions.iter().find(|condition| *condition.type_ == *Kind::Ready.as_str()).unwrap();
        (&ready.status, &ready.reason)
    }

    #[test]
    fn ready_takes_the_first_false_condition() {
        let mut report = Report::default();
        report.ok(Kind::TargetGroupResolved, Reason::Resolved, "");
        report.bad(Kind::TargetsRegistered, Reason::RegistrationFailed, "no");
        report.bad(Kind::BackendResolved, Reason::ServiceNotFound, "no");
        assert_eq!(ready(&status(&report, None, Some(1), at(1))), ("False", "ServiceNotFound"));
        assert_eq!(ready(&status(&good(), None, Some(1), at(1))), ("True", "Reconciled"));
        assert_eq!(ready(&status(&Report::default(), None, Some(1), at(1))), ("Unknown", "Pending"));
    }

    #[test]
    fn a_backend_that_was_scaled_to_zero_stays_ready_and_one_that_never_led_anywhere_is_not() {
        let binding = |generation: i64| {
            let metadata =
                serde_json::json!({"generation": generation, "creationTimestamp": "1970-01-01T00:00:10Z"});
            serde_json::from_value::<TargetGroupBinding>(serde_json::json!({
                "metadata": metadata, "spec": {"serviceRef": {"name": "web"}},
            }))
            .unwrap()
        };
        let patience = Duration::from_secs(30);
        let taken = |reason, old: Option<&Status>, generation, now| {
            empty(reason, old, &binding(generation), patience, now)
        };
        let before = status(&good(), None, Some(1), at(1));
        let mut scaled = good();
        scaled.findings[1].reason = Reason::NoMatchingPods;
        let scaled = status(&scaled, Some(&before), Some(1), at(2));
        assert_eq!(ready(&scaled), ("True", "NoMatchingPods"));
        for old in [&before, &scaled] {
            assert_eq!(taken(Reason::NoMatchingPods, Some(old), 1, 99), Empty::ScaledDown);
            // It names another Service now.
            assert_eq!(taken(Reason::NoMatchingPods, Some(old), 2, 99), Empty::Wrong);
            assert_eq!(taken(Reason::NoMatchingPort, Some(old), 1, 99), Empty::Wrong);
            assert_eq!(taken(Reason::NoMatchingNodes, Some(old), 1, 99), Empty::Wrong);
            assert_eq!(taken(Reason::BackendUnready, Some(old), 1, 99), Empty::Unready);
        }
        assert_eq!(taken(Reason::NoMatchingPods, None, 1, 15), Empty::New(Duration::from_secs(25)));
        assert_eq!(taken(Reason::NoMatchingPods, None, 1, 40), Empty::Wrong);
        let unknown = status(&Report::default(), None, Some(1), at(1));
        assert_eq!(taken(Reason::NoEndpoints, Some(&unknown), 1, 40), Empty::Wrong);
    }

    #[test]
    fn the_same_findings_later_are_the_same_status() {
        let first = status(&good(), None, Some(1), at(1));
        assert_eq!(status(&good(), Some(&first), Some(1), at(100)), first);
    }

    #[test]
    fn stalled_is_there_only_while_a_person_must_help() {
        let mut report = good();
        report.findings.clear();
        report.stalled(Kind::TargetGroupResolved, Reason::NotAllowed, "no");
        let stalled = status(&report, None, Some(1), at(1));
        assert!(stalled.conditions.iter().any(|condition| *condition.type_ == *Kind::Stalled.as_str()));
        let healed = status(&good(), Some(&stalled), Some(1), at(2));
        assert!(!healed.conditions.iter().any(|condition| *condition.type_ == *Kind::Stalled.as_str()));
    }

    #[test]
    fn a_sentence_or_a_count_is_no_difference_in_substance() {
        let first = status(&good(), None, Some(1), at(1));
        assert_eq!(difference(Some(&first), &first), Difference::None);
        let mut other = first.clone();
        Arc::make_mut(&mut other.conditions[0].said).message = "5 of 5".into();
        assert_eq!(difference(Some(&first), &other), Difference::Counts);
        let mut counted = first.clone();
        counted.targets = Some(TargetCounts { desired: 3, ..Default::default() });
        assert_eq!(difference(Some(&first), &counted), Difference::Counts);
        let mut bad = good();
        bad.findings[0].verdict = Verdict::False;
        let before = status(&bad, None, Some(1), at(1));
        bad.findings[0].message = "worse".to_owned();
        let worse = status(&bad, Some(&before), Some(1), at(1));
        assert_eq!(difference(Some(&before), &worse), Difference::Words);
        let newer = status(&good(), Some(&first), Some(2), at(1));
        assert_eq!(difference(Some(&first), &newer), Difference::Substance);
    }

    #[test]
    fn a_binding_that_ends_keeps_what_was_said_of_it() {
        let before = status(&good(), None, Some(1), at(1));
        let report = Report { ends: true, cleanup_failed: Some("no".to_owned()), ..Default::default() };
        let after = status(&report, Some(&before), Some(2), at(2));
        let registered = after.conditions.iter().find(|c| *c.type_ == *"TargetsRegistered").unwrap();
        assert_eq!((&*registered.status, ready(&after)), ("True", ("False", "CleanupFailed")));
        assert!(after.conditions.iter().any(|condition| *condition.type_ == *"CleanupFailed"));
    }
}
