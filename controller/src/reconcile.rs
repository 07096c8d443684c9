//! One binding's worker: resolves, compares, has the plan applied, reports. Workers of different bindings run side by side
//! and share no lock over a call. What is decided, is decided by functions without clock and calls (see `main.rs`).

mod cleanup;
mod networking;
mod report;
mod resolve;

use crate::apply::{Applied, Place, apply};
use crate::context::{Ctx, Wake};
use crate::desired::{Desired, Missing, Origin, TargetKey, desired, is_alive, is_of_cluster, not_there_yet};
use crate::error::Error;
use crate::events::first_few;
use crate::gates;
use crate::index::{Index, Key};
use crate::metrics;
use crate::network::{Claim, anywhere};
use crate::observed::Observed;
use crate::ownership::{self, Mark, Owner};
use crate::plan::{Plan, Situation, plan};
use crate::polling::{Hurry, next_look};
use crate::reason::{EventReason, Kind, Reason};
use crate::security;
use crate::status::{self, Empty, Report, Verdict};
use crate::tracking::Tracking;
use crate::writes::{CONFLICT, Writes, has_finalizer, is_conflict};
use crate::zones::Zones;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tgb_api::options::{Options, WhenNoneReady};
use tgb_api::target_group::{TargetGroup, TargetType};
use tgb_api::v1::{FirstContact, Sharing, TargetGroupBinding};
use tgb_aws::values::{Target, TargetState};
use tgb_aws::{Aws, AwsError};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

pub(crate) const BACKOFF_FIRST: Duration = Duration::from_secs(1);
pub(crate) const BACKOFF_LAST: Duration = Duration::from_secs(60);
/// An event about the same reason, with other words, is sent at most this often.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// A first pass that takes longer is announced.
const ANNOUNCE: Duration = Duration::from_secs(1);
/// Endpoints whose pods are not known are told of after so long: the watches of both are not in step.
const UNKNOWN_FOR: Duration = Duration::from_secs(10);
/// The age of a broken watch from which on the cluster is not known well enough to take away what seems to run.
const BLIND_FOR: Duration = Duration::from_secs(30);
/// Nothing is to be done until something changes.
const IDLE: Duration = Duration::from_secs(3600);

/// How long passes may go on after a stop.
const LAST_CALLS: Duration = Duration::from_millis(500);

/// The worker of a binding; ends when the binding is gone.
pub(crate) async fn work(ctx: Arc<Ctx>, key: Key, wake: Arc<Wake>) {
    let mut announced = Some(AbortOnDropHandle::new(tokio::spawn(announce(Arc::clone(&ctx), key.clone()))));
    let mut worker =
        Worker { ctx, key, uid: String::new(), memory: Memory::default(), changed: None, turn: None };
    while !worker.ctx.stop.is_cancelled() {
        let changed = wake.take_changed();
        if changed.is_some() {
            worker.memory.failures = 0;
        }
        // A pass that waited for its turn begins anew, and is still about the change that it was about.
        worker.changed = worker.changed.filter(|_| worker.turn.is_some()).or(changed);
        let ctx = Arc::clone(&worker.ctx);
        // Boxed, so that a worker that waits keeps nothing of the calls of its last pass.
        let next = tokio::select! {
            next = Box::pin(worker.pass()) => next,
            () = given_up(&ctx) => break,
        };
        let Some(next) = next else {
            ctx.events.forget(&worker.uid);
            break;
        };
        // Its memory stays as long as somebody could ask how it ended.
        drop(announced.take());
        tokio::select! {
            () = wake.notify.notified() => {}
            () = tokio::time::sleep_until(next) => {}
            () = worker.ctx.stop.cancelled() => break,
        }
    }
}

/// A pass that is under way at a stop may end its call; one that still waits for its turn at AWS must not hold up the next
/// leader, which compares everything anyway.
async fn given_up(ctx: &Ctx) {
    ctx.stop.cancelled().await;
    tokio::time::sleep(LAST_CALLS).await;
}

/// Says `Pending` of a binding whose first pass takes long.
async fn announce(ctx: Arc<Ctx>, key: Key) {
    tokio::time::sleep(ANNOUNCE).await;
    let binding = ctx.index().binding(&key);
    let is_new = |binding: &TargetGroupBinding| {
        let conditions = binding.status.as_ref().map(|status| status.conditions.is_empty());
        conditions.unwrap_or(true) && !binding.is_terminating()
    };
    if let Some(binding) = binding.filter(is_new) {
        Writes::default().set_status(&ctx, &binding, &Report::default(), None).await;
    }
}

/// What a worker knows from AWS and remembers between passes; lost at a restart without harm.
#[derive(Default)]
struct Memory {
    /// What `group` was resolved from: ARN, name, role. Other words begin anew.
    resolved_from: Option<(Option<String>, Option<String>, Option<String>)>,
    group: Option<TargetGroup>,
    /// The ARN of the last group. One of another ARN begins anew: the target group of this name was made anew.
    arn: Option<String>,
    group_read: Option<Instant>,
    /// The group's tags, where a rule asks for them.
    tags: Option<BTreeMap<String, String>>,
    /// AWS said that there is no such target group.
    group_is_gone: bool,
    /// A call said so of one that was there, and it is looked up again.
    group_is_doubted: bool,
    zones: Zones,
    observed: Observed,
    next_poll: Option<Instant>,
    /// When AWS was last asked or told, and how often it was asked since it was told.
    touched: Option<Instant>,
    looks: usize,
    /// When AWS was last asked, for people.
    asked: Option<Timestamp>,
    /// The ConfigMap of a binding that is Shared, or was.
    tracking: Option<Box<Tracking>>,
    /// Registered targets of a Shared binding that are or were its own, draining ones included.
    served: BTreeSet<TargetKey>,
    /// Entries that it listed without being this binding's.
    strange: BTreeSet<TargetKey>,
    /// There is no ConfigMap of a binding that is not Shared.
    untracked: bool,
    /// Since when there are endpoints whose pods are not known.
    unknown_since: Option<Instant>,
    failures: u32,
    /// Number of times in a row that the security groups of its targets could not be found.
    networking_failures: u32,
    writes: Writes,
    /// Events that stand for what is wrong now, when they were sent, and their words.
    told: BTreeMap<(EventReason, Reason), (Instant, String)>,
    /// Pods that lack their gate and were named by an event, by UID.
    named: BTreeSet<String>,
    /// Since when the clean-up fails.
    cleanup_since: Option<Timestamp>,
}

struct Worker {
    ctx: Arc<Ctx>,
    key: Key,
    uid: String,
    memory: Memory,
    /// The change that this pass is about.
    changed: Option<Instant>,
    /// AWS, where the next change of targets need not wait.
    turn: Option<Aws>,
}

/// How a pass ended.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// Look again at the next poll, or earlier.
    Done(Option<Duration>),
    /// Look again after a backoff.
    Failed,
    /// Look again at once, and say nothing: the turn to change targets has come, which took a while, the target group is not
    /// there after all, or somebody else wrote the binding just now.
    Again,
}

/// What a pass may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Writes,
    /// The binding is paused: nothing in AWS.
    Paused,
    /// `--observe`: nothing but status and events, since another controller is at work.
    Observes,
}

/// What a pass finds out about targets, in this order.
struct Found {
    mode: Mode,
    group: TargetGroup,
    wanted: Desired,
    backend: Backend,
    subnets: Arc<Vec<IpNet>>,
    /// What is wanted, with zones.
    targets: BTreeMap<TargetKey, Target>,
    contact: Contact,
    plan: Plan,
    applied: Applied,
    /// Pods that lack their readiness gate.
    without_gate: usize,
    outcome: Outcome,
}

/// The first contact with a target group, as a pass sees it.
struct Contact {
    record: Box<FirstContact>,
    /// Registered targets that are not this cluster's, and that nobody agreed to deregister.
    foreign: BTreeSet<TargetKey>,
    /// The time until which they are left alone; `None`: for ever.
    until: Option<Timestamp>,
}

impl Contact {
    fn is_shared(&self) -> bool {
        ownership::sharing_of(&self.record) == Sharing::Shared
    }
}

impl Worker {
    /// One pass; the time of the next, or `None` when the binding is gone.
    #[tracing::instrument(name = "reconcile", skip_all, fields(binding = %self.key, arn))]
    async fn pass(&mut self) -> Option<Instant> {
        let binding = self.ctx.index().binding(&self.key)?;
        let uid = binding.metadata.uid.as_deref().unwrap_or_default();
        if self.uid != uid {
            // The first one, or one made anew under the same name: what was known of that before is not true of it.
            if !self.uid.is_empty() {
                self.ctx.events.forget(&self.uid);
            }
            (self.memory, self.uid) = (Memory::default(), uid.to_owned());
        }
        let begun = Instant::now();
        if !self.ctx.term.serves() {
            return Some(begun + BACKOFF_LAST);
        }
        if binding.is_owned_by_lbc() && !self.ctx.settings.manage_lbc_bindings {
            let assumed = anywhere(&binding.spec);
            security::put_claim(&self.ctx, &self.key, Claim::keeping(assumed.clone()), &assumed);
            return Some(begun + IDLE);
        }
        let mut report = Report::default();
        let outcome = if binding.is_terminating() {
            // Under `--observe` the finalizer is that of the controller that is observed.
            if !has_finalizer(&binding) || self.mode(&binding) == Mode::Observes {
                return Some(begun + IDLE);
            }
            report.ends = true;
            match self.clean_up(&binding, &mut report).await {
                Ok(()) => return Some(Instant::now() + BACKOFF_LAST),
                Err(outcome) => outcome,
            }
        } else {
            self.reconcile(&binding, &mut report).await
        };
        if !self.ctx.term.serves() {
            // What a replica thinks whose time is over is nobody's status.
            return Some(begun + BACKOFF_LAST);
        }
        if matches!(outcome, Outcome::Again) {
            return Some(begun);
        }
        self.turn = None;
        self.measure(&report, outcome, begun);
        self.tell(&binding, &report);
        let ctx = Arc::clone(&self.ctx);
        let generation = binding.metadata.generation;
        let status_again = self.memory.writes.set_status(&ctx, &binding, &report, generation).await;
        let now = Instant::now();
        let next = match outcome {
            Outcome::Done(again) => {
                self.memory.failures = 0;
                let poll = self.memory.next_poll.unwrap_or(now + self.ctx.settings.health_poll);
                again.map_or(poll, |again| poll.min(now + again))
            }
            Outcome::Failed => {
                self.memory.failures = self.memory.failures.saturating_add(1);
                now + backoff(self.memory.failures, fastrand::f64())
            }
            Outcome::Again => now,
        };
        Some(status_again.map_or(next, |again| next.min(now + again)))
    }

    fn measure(&self, report: &Report, outcome: Outcome, begun: Instant) {
        let result = match outcome {
            Outcome::Done(_) | Outcome::Again => "ok",
            Outcome::Failed => "error",
        };
        let (_, reason, _) = report.ready();
        let pass = metrics::Pass { result, reason: reason.as_str() };
        self.ctx.metrics.passes.get_or_create(&pass).inc();
        let duration = self.ctx.metrics.pass_duration.get_or_create(&metrics::Result { result }).clone();
        duration.observe(begun.elapsed().as_secs_f64());
        self.ctx.standings().entry(self.key.clone()).or_default().reason = Some(reason);
    }

    /// Events for what went wrong: once per cause, and again if the words change.
    fn tell(&mut self, binding: &TargetGroupBinding, report: &Report) {
        let now = Instant::now();
        let found = report.findings.iter().filter(|finding| finding.verdict == Verdict::False);
        let found = found.map(|finding| (finding.kind, finding.reason, finding.message.clone()));
        let stale = report.stale_rules.iter();
        let found = found.chain(stale.map(|(reason, said)| (Kind::NetworkingReady, *reason, said.clone())));
        let cleanup = report.cleanup_failed.iter();
        let cleanup = cleanup.map(|cause| (Kind::CleanupFailed, Reason::CleanupFailed, cause.clone()));
        let key_of = |kind: Kind, reason: Reason| (EventReason::of(kind, reason), reason);
        let notes = report.notes.iter().map(|(event, reason, note)| ((*event, *reason), note.clone()));
        let found = found.chain(cleanup).map(|(kind, reason, message)| (key_of(kind, reason), message));
        // Of those about the same reason the condition's goes first.
        let mut causes = BTreeMap::new();
        for (key, message) in found.chain(notes) {
            causes.entry(key).or_insert(message);
        }
        self.memory.told.retain(|told, _| causes.contains_key(told));
        for (key, message) in causes {
            let (event, reason) = key;
            let is_news = self.memory.told.get(&key).is_none_or(|(at, words)| {
                *words != message && now.saturating_duration_since(*at) >= TELL_AGAIN
            });
            if !is_news {
                continue;
            }
            let note = format!("{reason}: {message}");
            match reason {
                Reason::Paused => self.ctx.events.normal(binding, event, note),
                _ => self.ctx.events.warning(binding, event, note),
            }
            self.memory.told.insert(key, (now, message));
        }
    }

    /// AWS, where what somebody waits for goes before polls.
    fn aws(&self, binding: &TargetGroupBinding) -> Aws {
        match self.changed.is_some() || binding.status.is_none() {
            true => self.ctx.aws.urgent(),
            false => self.ctx.aws.clone(),
        }
    }

    fn mode(&self, binding: &TargetGroupBinding) -> Mode {
        if self.ctx.settings.observe {
            Mode::Observes
        } else if Options::of(binding).0.paused {
            Mode::Paused
        } else {
            Mode::Writes
        }
    }

    /// One pass over a living binding. Security groups come last, so that they never hold back a target.
    async fn reconcile(&mut self, binding: &TargetGroupBinding, report: &mut Report) -> Outcome {
        let found = self.targets(binding, report).await;
        if matches!(found, Err(Outcome::Again) | Ok(Found { outcome: Outcome::Again, .. })) {
            return Outcome::Again;
        }
        if found.is_err() {
            self.hold_gates(binding, report).await;
        }
        self.networking(binding, &found, report).await
    }

    /// Says in the gates of pods that wait why nothing can be registered for them.
    async fn hold_gates(&self, binding: &TargetGroupBinding, report: &Report) {
        let (verdict, reason, message) = report.ready();
        if verdict == Verdict::False && self.mode(binding) != Mode::Observes {
            let gates = gates::held_up(&self.ctx.index(), &self.key, reason, &message);
            gates::write(&self.ctx, gates).await;
        }
    }

    // ---- targets ----

    async fn targets(&mut self, binding: &TargetGroupBinding, report: &mut Report) -> Result<Found, Outcome> {
        let ctx = Arc::clone(&self.ctx);
        let mode = self.mode(binding);
        if binding.spec.networking.is_none() {
            let message = "spec.networking is absent: security groups are left alone";
            report.ok(Kind::NetworkingReady, Reason::NotManaged, message);
        }
        let group = self.resolve(binding, report).await?;
        let arn = group.arn.as_str().to_owned();
        tracing::Span::current().record("arn", arn.as_str());
        report.target_group_arn = Some(arn.clone());
        let owner = ownership::owner(&ctx.index(), binding, &arn);
        if let Some(owner) = owner {
            let message = format!("TGB115 the target group is bound by {owner} already");
            report.stalled(Kind::TargetGroupResolved, Reason::InUseByAnotherBinding, message);
            return Err(Outcome::Done(None));
        }
        let mut message = format!("target group {} exists", group.arn.name());
        if binding.spec.target_group.is_replaced_by(&arn) {
            message.push_str(&format!("; it was made anew, and the one of this name is {arn} now"));
        }
        report.ok(Kind::TargetGroupResolved, Reason::Resolved, message);

        let wanted = desired(&ctx.index(), binding, &group, &ctx.settings.switches);
        let backend = self.backend(binding, &wanted, report)?;
        // From here on something of ours may be registered, which a deletion has to undo.
        if mode == Mode::Writes && !has_finalizer(binding) {
            let written = self.memory.writes.set_finalizer(&ctx, binding, true).await;
            match written {
                Ok(true) => {}
                // It was deleted since the pass began, and nobody would undo what comes now.
                Ok(false) => return Err(Outcome::Done(None)),
                Err(error) => return Err(self.unwritten(report, "the finalizer", error).await),
            }
        }
        let (subnets, targets) =
            self.zoned(binding, &group, &wanted).await.map_err(|error| self.failed(report, &error.into()))?;
        self.observe(binding, &arn, &targets).await.map_err(|error| self.failed(report, &error.into()))?;
        let tracked = self.track(binding, &targets, mode).await;
        tracked.map_err(|error| self.failed(report, &Error::tracking(error)))?;

        let contact = self.contact(binding, &arn, &targets);
        let mut found = Found {
            mode,
            group,
            wanted,
            backend,
            subnets,
            targets,
            contact,
            plan: Plan::default(),
            applied: Applied::default(),
            without_gate: 0,
            outcome: Outcome::Done(None),
        };
        found.plan = self.plan(binding, &found, Instant::now());
        if mode == Mode::Writes {
            self.introduce(binding, &found, report).await?;
            self.take_turn(binding, &found.plan, report).await?;
            if let Err(error) = self.note(&found.plan.register, &found.targets).await {
                return Err(self.failed(report, &Error::tracking(error)));
            }
            report.first_contact = Some(found.contact.record.clone());
            found.applied = self.apply(binding, &found).await;
        }
        if mode != Mode::Observes {
            self.open_gates(&found.wanted, &found.group).await;
        }
        let waits = self.poll_soon(&found.targets, &found.plan);
        found.outcome = self.outcome(&found);
        found.without_gate = self.without_gate(binding, &found.group);
        self.report_targets(&found, report);
        self.stand(&found, waits);
        Ok(found)
    }

    /// Before the first target is registered, the status says that the group was looked at and what of others was there:
    /// what comes from then on is ours, also if we end before the pass does. Of a Shared binding the ConfigMap says that.
    async fn introduce(
        &mut self,
        binding: &TargetGroupBinding,
        found: &Found,
        report: &mut Report,
    ) -> Result<(), Outcome> {
        if binding.spec.target_group.sharing() == Sharing::Shared {
            return Ok(());
        }
        let known = self.memory.writes.status(binding).and_then(|status| status.first_contact.as_ref());
        let is_known = known == Some(&found.contact.record);
        // The ConfigMap of a binding that was Shared says what is ours until the status does.
        let is_needed = !found.plan.register.is_empty() || self.memory.tracking.is_some();
        let ctx = Arc::clone(&self.ctx);
        if is_needed && !is_known {
            let mut first = report.clone();
            self.report_contact(found, &mut first);
            let written = self.memory.writes.put_status(&ctx, binding, &first).await;
            if let Err(error) = written {
                return Err(self.unwritten(report, "the status", error).await);
            }
        }
        if self.memory.tracking.take().is_some() {
            let removed = Tracking::remove(&ctx.client, &self.key).await;
            removed.map_err(|error| self.failed(report, &Error::tracking(error)))?;
            self.memory.untracked = true;
        }
        Ok(())
    }

    /// What has to be written before the first target is registered was not.
    async fn unwritten(&mut self, report: &mut Report, what: &'static str, error: kube::Error) -> Outcome {
        if self.lets_others_write(&error).await {
            return Outcome::Again;
        }
        self.failed(report, &Error::cluster(what, error))
    }

    /// Whether a write failed only since somebody else was faster, for the first time in a row: the watch shows theirs in a
    /// moment, and it is nobody's fault.
    async fn lets_others_write(&mut self, error: &kube::Error) -> bool {
        if !is_conflict(error) || self.memory.failures > 0 {
            return false;
        }
        self.memory.failures = 1;
        tokio::time::sleep(CONFLICT).await;
        true
    }

    /// Waits for the turn to change targets, if there is something to change. Where that took a while, the pass begins anew, so
    /// that what came meanwhile goes out with the same call.
    async fn take_turn(
        &mut self,
        binding: &TargetGroupBinding,
        plan: &Plan,
        report: &mut Report,
    ) -> Result<(), Outcome> {
        if self.turn.is_some() || (plan.register.is_empty() && plan.deregister.is_empty()) {
            return Ok(());
        }
        let role = binding.spec.target_group.role();
        self.turn = self.ctx.aws.try_turn(role);
        if self.turn.is_some() {
            return Ok(());
        }
        match self.ctx.aws.turn(role).await {
            Ok(turn) => {
                self.turn = Some(turn);
                Err(Outcome::Again)
            }
            Err(error) => Err(self.failed(report, &error.into())),
        }
    }

    /// Has the plan done.
    async fn apply(&mut self, binding: &TargetGroupBinding, found: &Found) -> Applied {
        let ctx = Arc::clone(&self.ctx);
        let Found { group, wanted, subnets, plan, .. } = found;
        let nodes = node_zones(wanted);
        let zone_of = |zones: &Zones, target: &Target| {
            let node = nodes.get(&TargetKey::of(target)).copied();
            zones.of(&target.id.parse().ok()?, subnets, node)
        };
        let aws = self.turn.take().unwrap_or_else(|| ctx.aws.clone());
        let place = Place { ctx: &ctx, aws, binding, arn: group.arn.as_str(), changed: self.changed };
        let Memory { observed, zones, .. } = &mut self.memory;
        let applied = apply(place, plan, wanted, observed, zones, &zone_of).await;
        if let (true, Some(vpc)) = (zones.take_contradicted(), &group.vpc_id) {
            ctx.forget_subnets(vpc);
        }
        if !plan.register.is_empty() || !plan.deregister.is_empty() {
            (self.memory.touched, self.memory.looks) = (Some(Instant::now()), 0);
            self.memory.writes.expect_health();
        }
        applied
    }

    /// A call failed that all the rest depends on.
    fn failed(&mut self, report: &mut Report, error: &Error) -> Outcome {
        if error.is_target_group_not_found() && self.doubts() {
            return Outcome::Again;
        }
        self.memory.next_poll = None;
        warn!(binding = %self.key, %error, "a pass failed");
        report.bad(Kind::TargetsRegistered, Reason::RegistrationFailed, error.to_string());
        Outcome::Failed
    }

    /// The target group is to be looked up again; whether that is news.
    fn doubts(&mut self) -> bool {
        self.memory.group = None;
        !std::mem::replace(&mut self.memory.group_is_doubted, true)
    }

    /// Says how the backend stands.
    fn backend(
        &mut self,
        binding: &TargetGroupBinding,
        wanted: &Desired,
        report: &mut Report,
    ) -> Result<Backend, Outcome> {
        let unknown_for = match wanted.unknown.is_empty() {
            true => None,
            false => Some(self.memory.unknown_since.get_or_insert_with(Instant::now).elapsed()),
        };
        self.memory.unknown_since = self.memory.unknown_since.filter(|_| unknown_for.is_some());
        let settings = &self.ctx.settings;
        let index = self.ctx.index();
        let namespace = index.namespaces.get(&self.key.namespace).copied().unwrap_or_default();
        let full = if namespace.terminating { Duration::ZERO } else { settings.missing_backend_grace };
        match &wanted.missing {
            // A frozen rule: nothing is registered or deregistered.
            Some(Missing { is_gone: false, reason, message }) => {
                report.stalled(Kind::BackendResolved, *reason, message.clone());
                Err(Outcome::Done(None))
            }
            Some(missing) => {
                report.bad(Kind::BackendResolved, missing.reason, missing.message.clone());
                Ok(Backend { grace: Some(full), again_in: None })
            }
            None => {
                let now = Timestamp::now().as_second();
                let service = format!("Service {}/{}", self.key.namespace, binding.spec.service_ref.name);
                let Some(nothing) = &wanted.nothing else {
                    let again_in = unknown_for.and_then(|age| UNKNOWN_FOR.checked_sub(age));
                    if unknown_for.is_some() && again_in.is_none_or(|left| left.is_zero()) {
                        let all: Vec<&TargetKey> = wanted.unknown.iter().collect();
                        let message = format!(
                            "{service} has endpoints whose pods the controller does not know: {}; targets that run are \
                             not deregistered meanwhile",
                            first_few(&all)
                        );
                        report.unknown(Kind::BackendResolved, Reason::PodsUnknown, message);
                        return Ok(Backend::default());
                    }
                    report.ok(Kind::BackendResolved, Reason::Resolved, format!("{service} has the port"));
                    return Ok(Backend { grace: None, again_in });
                };
                if let Some(left) = not_there_yet(&index, binding, full, now) {
                    let message = format!("{service} is new: its endpoints are still to come");
                    report.unknown(Kind::BackendResolved, Reason::Pending, message);
                    return Ok(Backend { grace: Some(full), again_in: Some(left) });
                }
                let (reason, message) = (nothing.reason, nothing.message.clone());
                let verdict = status::empty(reason, self.memory.writes.status(binding), binding, full, now);
                let again_in = match verdict {
                    Empty::New(left) => {
                        report.unknown(Kind::BackendResolved, reason, message);
                        Some(left)
                    }
                    Empty::ScaledDown => {
                        report.ok(Kind::BackendResolved, reason, message);
                        None
                    }
                    Empty::Wrong => {
                        report.bad(Kind::BackendResolved, reason, message);
                        None
                    }
                    Empty::Unready => {
                        report.ok(Kind::BackendResolved, Reason::Resolved, format!("{service} has the port"));
                        None
                    }
                };
                Ok(Backend { grace: None, again_in })
            }
        }
    }

    /// Reads DescribeTargetHealth if nothing is known or a poll is due.
    async fn observe(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        targets: &BTreeMap<TargetKey, Target>,
    ) -> Result<(), AwsError> {
        let due = self.memory.next_poll.is_none_or(|at| at <= Instant::now());
        if self.memory.observed.is_known() && !due {
            return Ok(());
        }
        let aws = self.aws(binding);
        let seen = self.ctx.target_health(&aws, binding.spec.target_group.role(), arn).await?;
        let now = Instant::now();
        self.memory.observed.show(seen, |key| targets.contains_key(key), now);
        (self.memory.touched, self.memory.asked) = (Some(now), Some(Timestamp::now()));
        self.memory.looks += 1;
        let period = self.ctx.poll_period().mul_f64(0.9 + fastrand::f64() * 0.2);
        self.memory.next_poll = Some(now + period);
        Ok(())
    }

    /// Reads the ConfigMap of a Shared binding; one that is missing, or is another binding's, begins with what is both
    /// registered and wanted. That of a binding that is not Shared any more tells what of the group is its own.
    async fn track(
        &mut self,
        binding: &TargetGroupBinding,
        targets: &BTreeMap<TargetKey, Target>,
        mode: Mode,
    ) -> Result<(), kube::Error> {
        let is_shared = binding.spec.target_group.sharing() == Sharing::Shared;
        let is_looked_for = is_shared || (mode == Mode::Writes && !self.memory.untracked);
        if self.memory.tracking.is_some() || !is_looked_for {
            return Ok(());
        }
        let mark = self.mark(binding);
        if !is_shared && !ownership::may_have_been_shared(binding, &mark) {
            self.memory.untracked = true;
            return Ok(());
        }
        let mut read = match Tracking::read(self.ctx.client.clone(), &self.key, mark).await {
            Ok(read) => read,
            // Where we may not touch ConfigMaps, we have made none.
            Err(kube::Error::Api(status)) if !is_shared && status.is_forbidden() => {
                self.memory.untracked = true;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        let tracked = read.tracked();
        if tracked.is_none() && !is_shared {
            self.memory.untracked = true;
            return Ok(());
        }
        let agrees = Options::of(binding).0.adopt_targets;
        let (mine, strange) = {
            let index = self.ctx.index();
            let is_own = |key: &TargetKey| targets.contains_key(key) || is_of_cluster(&index, key);
            tracked.as_ref().map(|tracked| tracked.adopted(agrees, is_own)).unwrap_or_default()
        };
        read.targets = mine;
        if is_shared && tracked.is_none_or(|tracked| tracked.owner == Owner::Others) {
            let present = |key: &&TargetKey| self.memory.observed.present(key).is_some();
            read.targets.extend(targets.keys().filter(present).cloned());
        }
        (self.memory.tracking, self.memory.strange) = (Some(Box::new(read)), strange);
        Ok(())
    }

    /// Notes what is about to be registered before it is, and takes out what is neither wanted nor registered.
    async fn note(
        &mut self,
        register: &[Target],
        targets: &BTreeMap<TargetKey, Target>,
    ) -> Result<(), kube::Error> {
        let Memory { tracking: Some(tracking), observed, .. } = &mut self.memory else { return Ok(()) };
        let noted = noted(&tracking.targets, targets, observed, register);
        let quic = |key: &TargetKey| targets.get(key).and_then(|target| target.quic_server_id.clone());
        let answer = tracking.write(noted, quic).await;
        if answer.is_err() {
            self.memory.tracking = None;
        }
        answer
    }

    fn mark(&self, binding: &TargetGroupBinding) -> Mark {
        Mark::of(&self.ctx.settings.cluster_name, binding)
    }

    /// The first contact with the target group: as the status tells, or it is now.
    fn contact(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        targets: &BTreeMap<TargetKey, Target>,
    ) -> Contact {
        let (ctx, now) = (Arc::clone(&self.ctx), Timestamp::now());
        let (mark, sharing) = (self.mark(binding), binding.spec.target_group.sharing());
        let Memory { observed, tracking, strange, writes, .. } = &mut self.memory;
        let index = ctx.index();
        let is_own = |key: &TargetKey| {
            targets.contains_key(key) || observed.is_ours(key) || is_of_cluster(&index, key)
        };
        let is_same = |record: &&FirstContact| {
            *record.target_group_arn == *arn && ownership::sharing_of(record) == sharing
        };
        let known = mark.record(writes.status(binding)).filter(is_same).cloned();
        let mut record = Box::new(known.unwrap_or_else(|| {
            let foreign = match sharing {
                Sharing::Shared => strange.clone(),
                Sharing::Exclusive => {
                    let was_tracked = tracking.as_ref().map(|tracking| &tracking.targets);
                    let is_foreign = |key: &&TargetKey| {
                        observed.present(key).is_some()
                            && !is_own(key)
                            && !was_tracked.is_some_and(|tracked| tracked.contains(key))
                    };
                    observed.targets().keys().filter(is_foreign).cloned().collect()
                }
            };
            ownership::first_contact(&mark, arn, sharing, &foreign, now)
        }));
        // A ConfigMap that lost its mark, since LBC wrote it meanwhile, may list more.
        for key in strange.iter().map(ToString::to_string) {
            if sharing == Sharing::Shared && !record.foreign_targets.contains(&key) {
                record.foreign_targets.push(key);
            }
        }
        let grace = ctx.settings.foreign_targets_grace.filter(|_| sharing == Sharing::Exclusive);
        let until = ownership::foreign_until(&record, grace);
        if Options::of(binding).0.adopt_targets {
            let adopted = std::mem::take(&mut record.foreign_targets);
            strange.clear();
            if let (Sharing::Shared, Some(tracking)) = (sharing, tracking) {
                tracking.targets.extend(adopted.iter().filter_map(|entry| TargetKey::parse(entry)));
            }
        } else if until.is_some_and(|until| until <= now) {
            record.foreign_targets.clear();
        } else {
            ownership::settle(&mut record, is_own);
        }
        let foreign = ownership::foreign(&record, observed, is_own);
        Contact { record, foreign, until }
    }

    /// A kind of object that has not been seen for long, and for how long.
    fn blind(&self) -> Option<(&'static str, Duration)> {
        self.ctx.blind(&self.key.namespace).filter(|(_, age)| *age >= BLIND_FOR)
    }

    fn plan(&mut self, binding: &TargetGroupBinding, found: &Found, now: Instant) -> Plan {
        let is_blind = self.blind().is_some();
        let Found { wanted, targets, contact, backend, .. } = found;
        let ctx = Arc::clone(&self.ctx);
        let index = ctx.index();
        let settings = &ctx.settings;
        let is_shared = binding.spec.target_group.sharing() == Sharing::Shared;
        let Memory { observed, tracking, .. } = &mut self.memory;
        observed.adopt(wanted);
        observed.keep_refused(|key| targets.contains_key(key), now);
        let unwanted_for = observed.unwanted_for(|key| targets.contains_key(key), now);
        let mut protected = ownership::wanted_by_others(&index, &settings.switches, binding, &found.group);
        protected.extend(contact.foreign.iter().cloned());
        let when_none_ready = Options::of(binding).0.when_none_ready;
        let keeps = match when_none_ready {
            Some(choice) => choice == WhenNoneReady::Keep,
            None => settings.keep_last.applies(&found.group),
        };
        let none_ready = backend.grace.is_none() && targets.is_empty() && !wanted.unready.is_empty();
        let mut alive = alive(&index, binding, observed);
        if when_none_ready == Some(WhenNoneReady::Deregister) {
            // The user prefers none: what is not ready is as good as dead.
            alive.retain(|key| !wanted.unready.contains(key));
        }
        plan(&Situation {
            desired: targets,
            observed: observed.targets(),
            assumed: &observed.assumed(),
            alive: &alive,
            tracked: tracking.as_ref().filter(|_| is_shared).map(|tracking| &tracking.targets),
            protected: &protected,
            rejected: &observed.not_now(now).0,
            unwanted_for: &unwanted_for,
            hold: !wanted.unknown.is_empty() || is_blind,
            grace: backend.grace,
            keep_last: (keeps && none_ready).then_some(&wanted.unready),
            swap_grace: settings.swap_grace,
            max_targets: settings.max_targets,
        })
    }

    /// Whether the pass has to be done again, and when.
    fn outcome(&mut self, found: &Found) -> Outcome {
        let Found { mode, plan, applied, contact, backend, .. } = found;
        if let Some(error) = &applied.failed {
            if error.is_target_group_not_found() && self.doubts() {
                return Outcome::Again;
            }
            warn!(binding = %self.key, %error, "could not change targets");
            self.memory.next_poll = None;
            return Outcome::Failed;
        }
        self.memory.group_is_doubted = false;
        // Full by AWS's word: it may have room again later.
        if applied.no_room.is_some() {
            return Outcome::Failed;
        }
        let left = (applied.left > 0).then_some(BACKOFF_FIRST);
        let at_once = (applied.waits || applied.reregisters).then_some(Duration::ZERO);
        // Nothing comes of a plan that is only shown.
        let again_in = plan.again_in.filter(|_| *mode == Mode::Writes);
        let until = contact.until.filter(|_| !contact.foreign.is_empty());
        let contact = until.map(|until| Duration::try_from(until.duration_since(Timestamp::now())));
        let contact = contact.map(Result::unwrap_or_default);
        let retry = self.memory.observed.not_now(Instant::now()).1;
        let all = [again_in, left, at_once, contact, retry, backend.again_in];
        Outcome::Done(all.into_iter().flatten().min())
    }

    /// Brings the readiness gates of the binding's pods up to date.
    async fn open_gates(&mut self, wanted: &Desired, group: &TargetGroup) {
        if group.binding_target_type() != Some(TargetType::Ip) {
            return;
        }
        let mut by_pod = BTreeMap::new();
        for (key, wanted) in &wanted.targets {
            if let Origin::Pod { key: pod, .. } = &wanted.origin {
                by_pod.insert(pod, key);
            }
        }
        let observed = &self.memory.observed;
        let in_use = !group.load_balancer_arns.is_empty();
        let gates = {
            let state = |pod: &Key| {
                let seen = by_pod.get(pod).and_then(|key| observed.targets().get(key));
                gates::state(seen.map(|seen| &**seen), in_use)
            };
            gates::outdated(&self.ctx.index(), &self.key, state)
        };
        // Whether a load balancer is there decides over gates, so it must not be old news.
        let unused = gates.iter().any(|gate| gate.state.1 == gates::NOT_IN_USE);
        if unused && self.memory.group_read.is_some_and(|at| at.elapsed() > Duration::from_secs(5)) {
            self.memory.group = None;
            self.memory.next_poll = Some(Instant::now());
            return;
        }
        for gate in gates.iter().filter(|gate| gate.turns && gate.state.0 == "True") {
            let since = by_pod.get(&gate.pod).and_then(|key| observed.since(key));
            if let Some(since) = since {
                self.ctx.metrics.gate_seconds.observe(since.elapsed().as_secs_f64());
            }
        }
        gates::write(&self.ctx, gates).await;
    }

    /// Moves the next poll closer while something is under way. Whether somebody waits for it.
    fn poll_soon(&mut self, targets: &BTreeMap<TargetKey, Target>, plan: &Plan) -> bool {
        let observed = &self.memory.observed;
        let is_new = |key| observed.present(key).is_some_and(|seen| seen.state == TargetState::Initial);
        let waits = !plan.spare.is_empty() || gates::waits(&self.ctx.index(), &self.key);
        let hurry = if waits {
            Hurry::Waiting
        } else if targets.keys().any(is_new) {
            Hurry::New
        } else {
            Hurry::Idle
        };
        let others =
            self.ctx.standings().iter().filter(|(key, other)| other.waits && **key != self.key).count();
        let rate = self.ctx.settings.poll_rate;
        if let Some(delay) = next_look(hurry, self.memory.looks, others + 1, rate) {
            let at = self.memory.touched.unwrap_or_else(Instant::now) + delay;
            self.memory.next_poll = self.memory.next_poll.map(|next| next.min(at));
        }
        waits
    }
}

/// The state of the backend.
#[derive(Debug, Clone, Copy, Default)]
struct Backend {
    /// The time for which targets that run stay while it is missing, if it is.
    grace: Option<Duration>,
    /// When that is over by itself.
    again_in: Option<Duration>,
}

/// How long to wait after so many failures in a row; `random` of 0 to 1 keeps those that failed together apart.
pub(crate) fn backoff(failures: u32, random: f64) -> Duration {
    let most = BACKOFF_FIRST.saturating_mul(2u32.saturating_pow(failures.saturating_sub(1).min(8)));
    most.min(BACKOFF_LAST).mul_f64(1.0 - random * 0.25)
}

/// The targets that the ConfigMap of a Shared binding is to name: those of before that are wanted or registered, and
/// those that are about to be registered.
fn noted(
    before: &BTreeSet<TargetKey>,
    wanted: &BTreeMap<TargetKey, Target>,
    observed: &Observed,
    register: &[Target],
) -> BTreeSet<TargetKey> {
    let is_kept = |key: &&TargetKey| wanted.contains_key(key) || observed.present(key).is_some();
    before.iter().filter(is_kept).cloned().chain(register.iter().map(TargetKey::of)).collect()
}

/// Registered targets whose pod or node still runs.
fn alive(index: &Index, binding: &TargetGroupBinding, observed: &Observed) -> BTreeSet<TargetKey> {
    let keys = observed.targets().keys();
    let runs = |key: &&TargetKey| is_alive(index, binding, key, observed.pod(key).map(|(_, uid)| uid));
    keys.filter(runs).cloned().collect()
}

/// The zones of the nodes that wanted targets run on.
fn node_zones(wanted: &Desired) -> BTreeMap<TargetKey, &str> {
    let zones = wanted.targets.iter().filter_map(|(key, wanted)| match &wanted.origin {
        Origin::Pod { zone, .. } => Some((key.clone(), zone.as_deref()?)),
        Origin::Node(_) | Origin::Bare => None,
    });
    zones.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tgb_aws::values::{ObservedTarget, TARGET_STATES};

    #[test]
    fn a_shared_binding_forgets_what_is_neither_wanted_nor_registered() {
        let target = |id: &str| Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None };
        let key = |id: &str| TargetKey::of(&target(id));
        let before = BTreeSet::from(["old", "gone", "wanted"].map(key));
        let wanted = BTreeMap::from(["wanted", "new"].map(|id| (key(id), target(id))));
        for (state, word, _) in TARGET_STATES {
            let mut observed = Observed::default();
            let old = ObservedTarget { target: target("old"), state, reason: None, description: None };
            observed.show(vec![old], |_| false, Instant::now());
            let noted = noted(&before, &wanted, &observed, &[target("new")]);
            let mut want = BTreeSet::from(["wanted", "new"].map(key));
            if state.is_registered() {
                want.insert(key("old"));
            }
            assert_eq!(noted, want, "{word}");
        }
    }

    #[test]
    fn failures_back_off_from_a_second_to_a_minute() {
        let seconds: Vec<u64> = (1..9).map(|failures| backoff(failures, 0.0).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!(backoff(u32::MAX, 1.0), Duration::from_secs(45));
    }

    #[test]
    fn in_an_outage_of_ten_minutes_aws_is_asked_ever_less_often_but_at_least_every_minute() {
        let (mut now, mut gaps) = (Duration::ZERO, Vec::new());
        for failures in 1.. {
            gaps.push(backoff(failures, fastrand::f64()));
            now += gaps.last().copied().unwrap();
            if now > Duration::from_secs(600) {
                break;
            }
        }
        assert!((15..=20).contains(&gaps.len()), "{gaps:?}");
        assert!(gaps.iter().all(|gap| *gap <= BACKOFF_LAST), "{gaps:?}");
        assert!(gaps.iter().skip(6).all(|gap| *gap >= Duration::from_secs(45)), "{gaps:?}");
    }
}
