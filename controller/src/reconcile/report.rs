//! What a pass says about targets: condition, counts, metrics.

use super::{Found, Mode, Worker};
use crate::context::Standing;
use crate::desired::{Nothing, TargetKey};
use crate::events::{counted, first_few, listed};
use crate::gates;
use crate::index::Key;
use crate::reason::{EventReason, Kind, Reason};
use crate::status::Report;
use std::collections::BTreeMap;
use tgb_api::names;
use tgb_api::target_group::{TargetGroup, TargetType};
use tgb_api::v1::{TargetCounts, TargetGroupBinding};
use tgb_aws::values::{Target, TargetState};
use tokio::time::Instant;

impl Worker {
    /// Counts the pods that lack their gate, and names new ones by event.
    pub(super) fn without_gate(&mut self, binding: &TargetGroupBinding, group: &TargetGroup) -> usize {
        if group.binding_target_type() != Some(TargetType::Ip) {
            return 0;
        }
        let service = Key::new(&self.key.namespace, &binding.spec.service_ref.name);
        let lacking = gates::lacking(&self.ctx.index(), &self.key, &service);
        let news: Vec<&Key> =
            lacking.iter().filter(|(_, uid)| !self.memory.named.contains(*uid)).map(|(key, _)| key).collect();
        if !news.is_empty() {
            let names: Vec<&str> = news.iter().map(|key| &*key.name).collect();
            let note =
                format!("pods without readiness gate, made before the binding: {}", listed("pod", &names));
            self.ctx.events.warning(binding, EventReason::ReadinessGateMissing, note);
        }
        self.memory.named = lacking.into_values().collect();
        self.memory.named.len()
    }

    pub(super) fn report_targets(&self, found: &Found, report: &mut Report) {
        let Found { wanted, targets, plan, applied, mode, without_gate, .. } = found;
        let kind = Kind::TargetsRegistered;
        let observed = &self.memory.observed;
        let counts = self.counts(targets);
        let mut more = String::new();
        if !wanted.left_out.is_empty() {
            more.push_str(&format!("; left out: {}", first_few(&wanted.left_out)));
        }
        if *without_gate > 0 {
            let pods = counted(*without_gate, "pod");
            more.push_str(&format!("; {pods} without readiness gate, made before the binding"));
        }
        if plan.held > 0 {
            let held = counted(plan.held, "target");
            let why = match self.blind() {
                Some((kind, age)) => format!("the watch of {kind} has been broken for {} s", age.as_secs()),
                None => "the pods of some endpoints are not known".to_owned(),
            };
            more.push_str(&format!("; {held} not wanted any more, but left alone since {why}"));
        }
        let foreign = foreign_words(found);
        if let Some(foreign) = &foreign {
            more.push_str("; ");
            more.push_str(foreign);
            report.notes.push((EventReason::ForeignTargets, Reason::ForeignTargets, foreign.clone()));
        }
        let ids = |targets: &[Target]| {
            let keys: Vec<TargetKey> = targets.iter().map(TargetKey::of).collect();
            listed("target", &keys)
        };
        if *mode != Mode::Writes {
            let why = if *mode == Mode::Paused { "paused" } else { "--observe" };
            let message = match (plan.register.as_slice(), plan.deregister.as_slice()) {
                ([], []) => format!("{why}: nothing would be changed{more}"),
                (register, []) => format!("{why}: would register {}{more}", ids(register)),
                ([], deregister) => format!("{why}: would deregister {}{more}", ids(deregister)),
                (register, deregister) => {
                    let (register, deregister) = (ids(register), ids(deregister));
                    format!("{why}: would register {register}; would deregister {deregister}{more}")
                }
            };
            report.notes.push((EventReason::Paused, Reason::Paused, message.clone()));
            match foreign.is_some() && !found.contact.is_shared() {
                true => report.bad(kind, Reason::ForeignTargets, message),
                false => report.bad(kind, Reason::Paused, message),
            }
        }
        if observed.is_fought_over(Instant::now()) {
            let message = "registered targets vanished three times in ten minutes: another controller owns this target \
                           group, too";
            report.bad(kind, Reason::TargetsRemovedByOthers, message);
        }
        if let Some(error) = &applied.failed {
            report.bad(kind, Reason::RegistrationFailed, error.to_string());
        }
        let mut refused = observed.refused();
        if let Some((first, why)) = refused.next() {
            let others: Vec<String> = refused.map(|(key, _)| key.to_string()).collect();
            let message = match others.len() {
                0 => format!("AWS refuses {first}: {why}{more}"),
                n => format!("AWS refuses {first} and {n} others ({}): {why}{more}", first_few(&others)),
            };
            report.bad(kind, Reason::TargetsRejected, message);
        }
        if let Some((count, words)) = &applied.no_room {
            report.bad(
                kind,
                Reason::TargetLimitReached,
                format!("no room for {}: {words}{more}", counted(*count, "target")),
            );
        }
        if plan.no_room > 0 {
            let message =
                format!("{} more than --max-targets-per-target-group{more}", counted(plan.no_room, "target"));
            report.bad(kind, Reason::TargetLimitReached, message);
        }
        report_foreign(found, report);
        if plan.last > 0 {
            let last = counted(plan.last, "target");
            report.bad(
                kind,
                Reason::BackendUnready,
                format!("none is ready although some run; the last stay: {last}{more}"),
            );
        } else if targets.is_empty() && !wanted.unready.is_empty() {
            let running = counted(wanted.unready.len(), "endpoint");
            report.bad(kind, Reason::BackendUnready, format!("none is ready of {running}{more}"));
        } else if let Some(Nothing { reason: Reason::BackendUnready, message }) = &wanted.nothing {
            report.bad(kind, Reason::BackendUnready, format!("{message}{more}"));
        }
        let message =
            format!("{} of {} registered{more}", counts.registered, counted(targets.len(), "target"));
        report.ok(kind, Reason::Registered, message);
        report.targets = Some(counts);
    }

    /// What is said before the first target is registered: what was there.
    pub(super) fn report_contact(&self, found: &Found, report: &mut Report) {
        report_foreign(found, report);
        report.targets = Some(self.counts(&found.targets));
        report.first_contact = Some(found.contact.record.clone());
    }

    fn counts(&self, targets: &BTreeMap<TargetKey, Target>) -> TargetCounts {
        let observed = &self.memory.observed;
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let count = |is_meant: fn(TargetState) -> bool| {
            let seen = targets.keys().filter_map(|key| observed.targets().get(key));
            number(seen.filter(|seen| is_meant(seen.state)).count())
        };
        let (all, healthy) = (number(targets.len()), count(|state| state == TargetState::Healthy));
        let draining = observed.targets().values().filter(|seen| !seen.state.is_registered()).count();
        TargetCounts {
            desired: all,
            registered: count(TargetState::is_registered),
            healthy,
            unhealthy: count(TargetState::is_unhealthy),
            draining: number(draining),
            summary: format!("{healthy}/{all}").into(),
            observed_at: self.memory.asked.map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string().into()),
            other: BTreeMap::new(),
        }
    }

    /// For metrics, and for the patience of others.
    pub(super) fn stand(&self, found: &Found, waits: bool) {
        let Found { targets, plan, mode, without_gate, .. } = found;
        let observed = &self.memory.observed;
        let mut states: BTreeMap<&'static str, usize> = BTreeMap::new();
        let is_mine = |key: &TargetKey| targets.contains_key(key) || observed.is_ours(key);
        for (key, seen) in observed.targets() {
            if is_mine(key) || !seen.state.is_registered() {
                *states.entry(seen.state.as_str()).or_default() += 1;
            }
        }
        let missing = targets.keys().filter(|key| observed.present(key).is_none()).count();
        states.insert("missing", missing);
        let planned = match mode {
            Mode::Writes => (0, 0),
            Mode::Paused | Mode::Observes => (plan.register.len(), plan.deregister.len()),
        };
        let mut standings = self.ctx.standings();
        let standing = standings.entry(self.key.clone()).or_default();
        let reason = standing.reason;
        *standing = Standing { reason, targets: states, planned, pods_without_gate: *without_gate, waits };
    }
}

/// Says that there are targets that are somebody else's, and stay. In a Shared group there may be.
fn report_foreign(found: &Found, report: &mut Report) {
    let Some(message) = foreign_words(found).filter(|_| !found.contact.is_shared()) else { return };
    match found.contact.until {
        Some(_) => report.bad(Kind::TargetsRegistered, Reason::ForeignTargets, message),
        None => report.stalled(Kind::TargetsRegistered, Reason::ForeignTargets, message),
    }
}

/// Names the targets that are somebody else's, if there are any, and says what to do.
fn foreign_words(found: &Found) -> Option<String> {
    let all: Vec<&TargetKey> = found.contact.foreign.iter().collect();
    if all.is_empty() {
        return None;
    }
    let (what, annotation) = (listed("target", &all), names::ADOPT_TARGETS);
    if found.contact.is_shared() {
        return Some(format!(
            "left alone, since it is not this cluster's, though this binding's ConfigMap listed it: {what}; to have it \
             deregistered, annotate the binding with {annotation}: \"true\""
        ));
    }
    let until = found.contact.until.map(|until| until.strftime(" until %Y-%m-%dT%H:%M:%SZ").to_string());
    Some(format!(
        "left alone{}, since it is not this cluster's and was registered before this binding: {what}; if it belongs \
         there, set sharing: Shared; to have it deregistered, annotate the binding with {annotation}: \"true\"",
        until.unwrap_or_default()
    ))
}
