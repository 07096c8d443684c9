//! The status of a binding: conditions with reasons for machines and sentences for people.

use crate::reason::{Kind, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use tgb_api::v1::{Status, TargetCounts};

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
    /// A clean-up that failed, and why.
    pub(crate) cleanup_failed: Option<String>,
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
}

/// The status to write, given the one that stands there. Times change only where a condition's status does, so that an
/// equal status is equal.
pub(crate) fn status(report: &Report, old: Option<&Status>, generation: Option<i64>, now: Time) -> Status {
    let old_conditions = old.map(|status| status.conditions.as_slice()).unwrap_or_default();
    let mut conditions: Vec<Condition> = Vec::new();
    let mut put = |kind: Kind, verdict: Verdict, reason: Reason, message: &str| {
        let before = old_conditions.iter().find(|condition| condition.type_ == kind.as_str());
        let last_transition_time = before
            .filter(|before| before.status == verdict.as_str())
            .map_or_else(|| now.clone(), |before| before.last_transition_time.clone());
        conditions.push(Condition {
            type_: kind.as_str().to_owned(),
            status: verdict.as_str().to_owned(),
            reason: reason.as_str().to_owned(),
            message: shortened(message),
            observed_generation: generation,
            last_transition_time,
        });
    };
    for kind in ORDER {
        match report.find(kind) {
            Some(finding) => put(kind, finding.verdict, finding.reason, &finding.message),
            None => put(kind, Verdict::Unknown, Reason::Pending, "not looked at yet"),
        }
    }
    let first = |verdict| {
        ORDER.iter().filter_map(|kind| report.find(*kind)).find(move |finding| finding.verdict == verdict)
    };
    let pending = ORDER.iter().find(|kind| report.find(**kind).is_none());
    match (first(Verdict::False), first(Verdict::Unknown), pending) {
        (Some(finding), _, _) => put(Kind::Ready, Verdict::False, finding.reason, &finding.message),
        (None, Some(finding), _) => put(Kind::Ready, Verdict::Unknown, finding.reason, &finding.message),
        (None, None, Some(kind)) => {
            put(Kind::Ready, Verdict::Unknown, Reason::Pending, &format!("{kind} is not known yet"))
        }
        (None, None, None) => {
            put(Kind::Ready, Verdict::True, Reason::Reconciled, "the target group is as the binding says")
        }
    }
    if let Some(finding) = report.findings.iter().find(|finding| finding.stalled) {
        put(Kind::Stalled, Verdict::True, finding.reason, &finding.message);
    }
    if let Some(cause) = &report.cleanup_failed {
        put(Kind::CleanupFailed, Verdict::True, Reason::CleanupFailed, cause);
    }
    let extra = [Kind::Ready, Kind::Stalled, Kind::CleanupFailed];
    let ours = |name: &str| ORDER.iter().chain(&extra).any(|kind| kind.as_str() == name);
    conditions.extend(old_conditions.iter().filter(|condition| !ours(&condition.type_)).cloned());
    Status {
        observed_generation: generation,
        target_group_arn: report
            .target_group_arn
            .clone()
            .or_else(|| old.and_then(|status| status.target_group_arn.clone())),
        conditions,
        targets: report.targets.clone().or_else(|| old.and_then(|status| status.targets.clone())),
    }
}

/// Whether two statuses differ in more than counts.
pub(crate) fn differs_in_substance(a: &Status, b: &Status) -> bool {
    (a.observed_generation, &a.target_group_arn, &a.conditions)
        != (b.observed_generation, &b.target_group_arn, &b.conditions)
}

/// Conditions hold 32 KiB; people read a few lines.
fn shortened(message: &str) -> String {
    const MOST: usize = 1024;
    if message.chars().count() <= MOST {
        return message.to_owned();
    }
    message.chars().take(MOST).chain(['…']).collect()
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
            status.conditions.iter().find(|condition| condition.type_ == Kind::Ready.as_str()).unwrap();
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
        assert!(stalled.conditions.iter().any(|condition| condition.type_ == Kind::Stalled.as_str()));
        let healed = status(&good(), Some(&stalled), Some(1), at(2));
        assert!(!healed.conditions.iter().any(|condition| condition.type_ == Kind::Stalled.as_str()));
    }
}
