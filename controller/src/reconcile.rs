//! One binding's worker: resolves, compares, applies, reports. Workers of different bindings run side by side and share
//! no lock over a call.

use crate::context::{Ctx, Wake};
use crate::desired::{Desired, Origin, TargetKey, desired, is_alive, is_of_cluster, zone};
use crate::events::listed;
use crate::gates;
use crate::index::{Index, Key, resolved_arn};
use crate::metrics;
use crate::network::{Claim, anywhere};
use crate::plan::{Plan, Situation, plan};
use crate::reason::{EventReason, Kind, Reason};
use crate::security::{self, Standing};
use crate::status::Verdict;
use crate::status::{self, Report};
use crate::tracking::Tracking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tgb_api::arn::TargetGroupArn;
use tgb_api::names;
use tgb_api::rules;
use tgb_api::target_group::{TargetGroup, TargetType};
use tgb_api::v1::{Sharing, Status, TargetCounts, TargetGroupBinding};
use tgb_aws::values::{ObservedTarget, Target, TargetState};
use tgb_aws::{AwsError, Class, TargetGroupQuery};
use tokio::time::Instant;
use tracing::{debug, info, warn};

/// RegisterTargets takes more, but larger calls fail at times.
const BATCH: usize = 200;
/// Calls that one pass may spend on registering when AWS refuses some targets.
const CALLS: usize = 16;
/// Counts are written at most this often.
const COUNTS_EVERY: Duration = Duration::from_secs(15);
/// Targets that vanish [`FIGHT`] times within this time were taken away by another controller.
const FIGHT_WINDOW: Duration = Duration::from_secs(600);
const FIGHT: usize = 3;
const BACKOFF_FIRST: Duration = Duration::from_secs(1);
const BACKOFF_LAST: Duration = Duration::from_secs(60);

/// The worker of a binding; ends when the binding is gone.
pub(crate) async fn work(ctx: Arc<Ctx>, key: Key, wake: Arc<Wake>) {
    let mut worker = Worker { ctx, key, memory: Memory::default(), changed: None };
    while !worker.ctx.stop.is_cancelled() {
        worker.changed = wake.take_changed();
        if worker.changed.is_some() {
            worker.memory.failures = 0;
        }
        let Some(next) = worker.pass().await else { return };
        tokio::select! {
            () = wake.notify.notified() => {}
            () = tokio::time::sleep_until(next) => {}
            () = worker.ctx.stop.cancelled() => return,
        }
    }
}

/// What a worker knows from AWS and remembers between passes; lost at a restart without harm.
#[derive(Default)]
struct Memory {
    /// What `group` was resolved from.
    resolved_from: Option<(Option<String>, Option<String>, Option<String>)>,
    group: Option<TargetGroup>,
    group_read: Option<Instant>,
    /// The group's tags, where a rule asks for them.
    tags: Option<BTreeMap<String, String>>,
    /// AWS said that there is no such target group.
    group_is_gone: bool,
    /// The last DescribeTargetHealth plus our acknowledged writes since.
    observed: Option<BTreeMap<TargetKey, ObservedTarget>>,
    /// Those of `observed` that are known by our own write only.
    assumed: BTreeSet<TargetKey>,
    next_poll: Option<Instant>,
    /// When AWS last showed or took targets, and how many polls ago something was registered.
    touched: Option<Instant>,
    polls: usize,
    /// Of a Shared binding.
    tracking: Option<Tracking>,
    /// UIDs of the pods that targets were registered for.
    uids: BTreeMap<TargetKey, String>,
    unwanted_since: BTreeMap<TargetKey, Instant>,
    rejected: BTreeMap<TargetKey, (Instant, String)>,
    first_contact: Option<Instant>,
    failures: u32,
    written: Option<Written>,
    /// Events that stand for what is wrong now.
    told: BTreeSet<(EventReason, String)>,
    /// Since when the clean-up fails.
    cleanup_since: Option<Instant>,
    /// Targets of ours that vanished, and when.
    vanished: Vec<Instant>,
}

struct Written {
    sent_version: Option<String>,
    version: Option<String>,
    status: Status,
    at: Instant,
}

struct Worker {
    ctx: Arc<Ctx>,
    key: Key,
    memory: Memory,
    /// The change that this pass is about.
    changed: Option<Instant>,
}

/// How a pass ended.
#[derive(Debug, Clone, Copy)]
enum Outcome {
    /// Look again at the next poll, or earlier.
    Done(Option<Duration>),
    /// Look again after a backoff.
    Failed,
}

impl Worker {
    /// One pass; the time of the next, or `None` when the binding is gone.
    async fn pass(&mut self) -> Option<Instant> {
        let binding = self.ctx.index().bindings.get(&self.key).cloned()?;
        if binding.is_owned_by_lbc() && !self.ctx.settings.manage_lbc_bindings {
            security::put_claim(&self.ctx, &self.key, anywhere(&binding));
            return Some(Instant::now() + Duration::from_secs(3600));
        }
        let begun = Instant::now();
        let mut report = Report::default();
        let outcome = if binding.is_terminating() {
            if !self.has_finalizer(&binding) {
                return Some(Instant::now() + Duration::from_secs(3600));
            }
            if self.clean_up(&binding, &mut report).await {
                return Some(Instant::now() + Duration::from_secs(60));
            }
            Outcome::Failed
        } else {
            self.reconcile(&binding, &mut report).await
        };
        let result = match outcome {
            Outcome::Done(_) => "ok",
            Outcome::Failed => "failed",
        };
        self.ctx.metrics.passes.get_or_create(&metrics::Result { result }).inc();
        self.ctx.metrics.pass_duration.observe(begun.elapsed().as_secs_f64());
        self.tell(&binding, &report);
        let status_again = self.write_status(&binding, &report).await;
        let now = Instant::now();
        let mut next = match outcome {
            Outcome::Done(again) => {
                self.memory.failures = 0;
                let poll = self.memory.next_poll.unwrap_or(now + self.ctx.settings.health_poll);
                again.map_or(poll, |again| poll.min(now + again))
            }
            Outcome::Failed => {
                self.memory.failures = self.memory.failures.saturating_add(1);
                let doubled = BACKOFF_FIRST * 2u32.saturating_pow(self.memory.failures.min(8) - 1);
                now + doubled.min(BACKOFF_LAST).mul_f64(0.8 + fastrand::f64() * 0.4)
            }
        };
        if let Some(again) = status_again {
            next = next.min(now + again);
        }
        Some(next)
    }

    /// Events for what went wrong, once per cause.
    fn tell(&mut self, binding: &TargetGroupBinding, report: &Report) {
        let cleanup = report.cleanup_failed.iter().map(|cause| (EventReason::CleanupFailed, cause.clone()));
        let found = report.findings.iter().filter(|finding| finding.verdict == Verdict::False);
        let causes: BTreeSet<(EventReason, String)> = found
            .filter(|finding| finding.reason != Reason::Paused)
            .map(|finding| {
                let event = EventReason::of(finding.kind, finding.reason);
                (event, format!("{}: {}", finding.reason, finding.message))
            })
            .chain(cleanup)
            .collect();
        for (event, note) in causes.difference(&self.memory.told) {
            self.ctx.events.warning(binding, *event, note.clone());
        }
        self.memory.told = causes;
    }

    fn has_finalizer(&self, binding: &TargetGroupBinding) -> bool {
        binding.metadata.finalizers.iter().flatten().any(|entry| entry == names::FINALIZER)
    }

    /// One pass over a living binding. Security groups come last, so that they never hold back a target.
    async fn reconcile(&mut self, binding: &Arc<TargetGroupBinding>, report: &mut Report) -> Outcome {
        let found = self.register_targets(binding, report).await;
        let outcome = match &found {
            Ok((_, _, outcome)) => *outcome,
            Err(outcome) => *outcome,
        };
        if binding.spec.networking.is_none() {
            security::put_claim(&self.ctx, &self.key, Claim::Groups(BTreeMap::new()));
            return outcome;
        }
        let keeps = || match security::claim_of(&self.ctx, &self.key) {
            Some(Claim::Groups(groups)) if !groups.is_empty() => Claim::Groups(groups),
            _ => anywhere(binding),
        };
        let claim = match &found {
            Ok((wanted, group, _)) if !wanted.targets.is_empty() => {
                let vpc = self.ctx.aws.vpc_id().or(group.vpc_id.as_deref());
                match security::claim(&self.ctx, binding, &wanted.targets, vpc).await {
                    Ok((claim, problem)) => {
                        if let Some((reason, message)) = problem {
                            report.bad(Kind::NetworkingReady, reason, message);
                        }
                        Some(claim)
                    }
                    Err(error) => {
                        report.bad(Kind::NetworkingReady, Reason::AccessDenied, error.to_string());
                        security::put_claim(
                            &self.ctx,
                            &self.key,
                            match keeps() {
                                known @ Claim::Groups(_) => known,
                                _ => Claim::Unknown,
                            },
                        );
                        return Outcome::Failed;
                    }
                }
            }
            // No endpoint, or sick for good: it keeps the rules that it had.
            Ok(_) | Err(Outcome::Done(_)) => Some(keeps()),
            Err(Outcome::Failed) if self.memory.group_is_gone => Some(keeps()),
            Err(Outcome::Failed) => None,
        };
        match claim {
            Some(claim) => security::put_claim(&self.ctx, &self.key, claim),
            None if security::claim_of(&self.ctx, &self.key).is_none() => {
                security::put_claim(&self.ctx, &self.key, Claim::Unknown);
            }
            None => {}
        }
        match security::standing(&self.ctx, &self.key) {
            Standing::Authorized(groups) => {
                report.ok(
                    Kind::NetworkingReady,
                    Reason::Authorized,
                    format!("{groups} security groups have the rules"),
                );
            }
            Standing::Failed(reason, message) => report.bad(Kind::NetworkingReady, reason, message),
            Standing::Pending => {
                report.unknown(
                    Kind::NetworkingReady,
                    Reason::Pending,
                    "the security groups are not done yet",
                );
            }
        }
        outcome
    }

    async fn register_targets(
        &mut self,
        binding: &Arc<TargetGroupBinding>,
        report: &mut Report,
    ) -> Result<(Desired, TargetGroup, Outcome), Outcome> {
        let writes = !self.ctx.settings.observe && binding.annotation(names::PAUSED) != Some("true");
        if binding.spec.networking.is_none() {
            report.ok(
                Kind::NetworkingReady,
                Reason::NotManaged,
                "spec.networking is absent: security groups are left alone",
            );
        }
        if writes
            && !self.has_finalizer(binding)
            && let Err(error) = self.set_finalizer(binding, true).await
        {
            warn!(binding = %self.key, %error, "could not set the finalizer");
            return Err(Outcome::Failed);
        }
        let group = match self.resolve(binding, report).await {
            Ok(group) => group,
            Err(outcome) => return Err(outcome),
        };
        let arn = group.arn.as_str().to_owned();
        report.target_group_arn = Some(arn.clone());
        if let Some(owner) = self.owner(binding, &arn) {
            report.stalled(
                Kind::TargetGroupResolved,
                Reason::InUseByAnotherBinding,
                format!("TGB115 the target group is bound by {owner} already"),
            );
            return Err(Outcome::Done(None));
        }
        report.ok(
            Kind::TargetGroupResolved,
            Reason::Resolved,
            format!("target group {} exists", group.arn.name()),
        );

        let wanted = desired(&self.ctx.index(), binding, &group, &self.ctx.settings.switches);
        match &wanted.missing {
            None => report.ok(
                Kind::BackendResolved,
                Reason::Resolved,
                format!("Service {}/{} has the port", self.key.namespace, binding.spec.service_ref.name),
            ),
            Some(missing) if missing.is_gone => {
                report.bad(Kind::BackendResolved, missing.reason, missing.message.clone());
            }
            // A frozen rule: nothing is registered or deregistered.
            Some(missing) => {
                report.stalled(Kind::BackendResolved, missing.reason, missing.message.clone());
                return Err(Outcome::Done(None));
            }
        }
        let targets = match self.with_zones(&wanted, &group).await {
            Ok(targets) => targets,
            Err(error) => {
                report.bad(Kind::TargetsRegistered, Reason::RegistrationFailed, error.to_string());
                return Err(Outcome::Failed);
            }
        };

        if let Err(error) = self.observe(binding, &arn).await {
            if error.is_target_group_not_found() {
                self.memory.group = None;
            }
            report.bad(Kind::TargetsRegistered, Reason::RegistrationFailed, error.to_string());
            return Err(Outcome::Failed);
        }
        if let Err(error) = self.track(binding, &targets).await {
            report.bad(
                Kind::TargetsRegistered,
                Reason::RegistrationFailed,
                format!("the ConfigMap of targets: {error}"),
            );
            return Err(Outcome::Failed);
        }
        if self.memory.vanished.len() >= FIGHT {
            report.bad(
                Kind::TargetsRegistered,
                Reason::TargetsRemovedByOthers,
                "registered targets vanished three times in ten minutes: another controller owns this target group, \
                 too",
            );
        }
        let first_contact = self.foreign_at_first_contact(binding);
        let plan = self.plan(binding, &arn, &wanted, &targets, &first_contact);
        let outcome = if writes {
            self.apply(binding, &arn, &wanted, &plan, report).await
        } else {
            report.bad(
                Kind::TargetsRegistered,
                Reason::Paused,
                format!("would register {} and deregister {}", plan.register.len(), plan.deregister.len()),
            );
            Outcome::Done(None)
        };
        self.open_gates(&wanted, &group, writes).await;
        self.poll_soon(&targets, &plan);
        self.report_targets(&wanted, &targets, &plan, &first_contact, report);
        let outcome = match outcome {
            Outcome::Done(_) => Outcome::Done(plan.again_in),
            failed @ Outcome::Failed => failed,
        };
        Ok((wanted, group, outcome))
    }

    /// The target group, from memory or from AWS, and whether the rules that are enforced here again let it through.
    async fn resolve(
        &mut self,
        binding: &TargetGroupBinding,
        report: &mut Report,
    ) -> Result<TargetGroup, Outcome> {
        let reference = &binding.spec.target_group;
        if let Some((reason, message)) = refused(&self.ctx, binding, None, None) {
            report.stalled(Kind::TargetGroupResolved, reason, message);
            return Err(Outcome::Done(None));
        }
        let from = (
            reference.arn().map(str::to_owned),
            reference.name().map(str::to_owned),
            reference.role().map(|role| role.role_arn.to_owned()),
        );
        if self.memory.resolved_from.as_ref() != Some(&from) {
            let written = self.memory.written.take();
            self.memory = Memory { resolved_from: Some(from), written, ..Default::default() };
        }
        let fresh = self.memory.group_read.is_some_and(|at| at.elapsed() < self.ctx.settings.resync);
        if self.memory.group.is_none() || !fresh {
            let query = match (reference.arn(), reference.name()) {
                (Some(arn), _) => TargetGroupQuery::Arn(arn),
                (None, name) => TargetGroupQuery::Name(name.unwrap_or_default()),
            };
            match self.ctx.aws.target_groups(reference.role(), query).await {
                Ok(groups) => {
                    self.memory.group = groups.into_iter().next();
                    self.memory.group_read = Some(Instant::now());
                    self.memory.tags = None;
                    self.memory.group_is_gone = self.memory.group.is_none();
                }
                Err(error) => {
                    let (reason, stalled) = reason_of(&error);
                    let message = match reason {
                        Reason::TargetGroupNotFound => {
                            format!("TGB110 the target group does not exist: {error}")
                        }
                        _ => error.to_string(),
                    };
                    match stalled {
                        true => report.stalled(Kind::TargetGroupResolved, reason, message),
                        false => report.bad(Kind::TargetGroupResolved, reason, message),
                    }
                    if reason == Reason::TargetGroupNotFound {
                        self.memory.group = None;
                        self.memory.group_is_gone = true;
                    }
                    return Err(Outcome::Failed);
                }
            }
        }
        let Some(group) = self.memory.group.clone() else {
            report.stalled(
                Kind::TargetGroupResolved,
                Reason::TargetGroupNotFound,
                "TGB110 the target group does not exist",
            );
            return Err(Outcome::Failed);
        };
        if self.memory.tags.is_none() && self.ctx.settings.rules.wants_tags() {
            match self.ctx.aws.tags(reference.role(), group.arn.as_str()).await {
                Ok(tags) => self.memory.tags = Some(tags),
                Err(error) => {
                    report.bad(Kind::TargetGroupResolved, reason_of(&error).0, error.to_string());
                    return Err(Outcome::Failed);
                }
            }
        }
        if let Some((reason, message)) = refused(&self.ctx, binding, Some(&group), self.memory.tags.as_ref())
        {
            report.stalled(Kind::TargetGroupResolved, reason, message);
            return Err(Outcome::Done(None));
        }
        Ok(group)
    }

    /// The older binding that owns the target group, if this one may not touch it.
    fn owner(&self, binding: &TargetGroupBinding, arn: &str) -> Option<String> {
        let index = self.ctx.index();
        let all = index.bindings_of(arn);
        let mut living = all.iter().filter(|other| !other.is_terminating());
        let owner = living.next()?;
        let is_me = owner.namespace() == binding.namespace() && owner.name() == binding.name();
        let both_shared = owner.spec.target_group.sharing() == Sharing::Shared
            && binding.spec.target_group.sharing() == Sharing::Shared;
        (!is_me && !both_shared).then(|| format!("{}/{}", owner.namespace(), owner.name()))
    }

    async fn with_zones(
        &self,
        wanted: &Desired,
        group: &TargetGroup,
    ) -> Result<BTreeMap<TargetKey, Target>, AwsError> {
        let is_ip = group.binding_target_type() == Some(TargetType::Ip);
        let mut targets: BTreeMap<TargetKey, Target> =
            wanted.targets.iter().map(|(key, wanted)| (key.clone(), wanted.target.clone())).collect();
        let (true, Some(vpc), false) = (is_ip, group.vpc_id.as_deref(), targets.is_empty()) else {
            return Ok(targets);
        };
        let ips: Vec<IpAddr> = targets.keys().filter_map(|key| key.id.parse().ok()).collect();
        let subnets = self.ctx.subnets(vpc, &ips).await?;
        for target in targets.values_mut() {
            target.zone = target.id.parse().ok().and_then(|ip: IpAddr| zone(&ip, &subnets));
        }
        Ok(targets)
    }

    /// Reads DescribeTargetHealth if nothing is known or a poll is due.
    async fn observe(&mut self, binding: &TargetGroupBinding, arn: &str) -> Result<(), AwsError> {
        let due = self.memory.next_poll.is_none_or(|at| at <= Instant::now());
        if self.memory.observed.is_some() && !due {
            return Ok(());
        }
        let seen = self.ctx.aws.target_health(binding.spec.target_group.role(), arn).await?;
        let seen: BTreeMap<TargetKey, ObservedTarget> =
            seen.into_iter().map(|seen| (TargetKey::of(&seen.target), seen)).collect();
        let is_there = |all: &BTreeMap<TargetKey, ObservedTarget>, key: &TargetKey| {
            all.get(key).is_some_and(|seen| seen.state != TargetState::Draining)
        };
        // What we registered and did not deregister should be there, unless its instance is gone.
        if let Some(before) = &self.memory.observed {
            let is_gone = |key: &TargetKey| is_there(before, key) && !is_there(&seen, key);
            if self.memory.uids.keys().any(is_gone) {
                self.memory.vanished.push(Instant::now());
            }
        }
        self.memory.vanished.retain(|at| at.elapsed() < FIGHT_WINDOW);
        self.memory.observed = Some(seen);
        self.memory.assumed.clear();
        self.memory.touched = Some(Instant::now());
        self.memory.polls += 1;
        let period = self.ctx.poll_period().mul_f64(0.9 + fastrand::f64() * 0.2);
        self.memory.next_poll = Some(Instant::now() + period);
        Ok(())
    }

    /// Reads the ConfigMap of a Shared binding; one that is missing begins with what is both registered and wanted.
    async fn track(
        &mut self,
        binding: &TargetGroupBinding,
        targets: &BTreeMap<TargetKey, Target>,
    ) -> Result<(), kube::Error> {
        if binding.spec.target_group.sharing() != Sharing::Shared {
            self.memory.tracking = None;
            return Ok(());
        }
        if self.memory.tracking.is_none() {
            let mut read = Tracking::read(self.ctx.client.clone(), &self.key).await?;
            if !read.exists() {
                let observed = self.memory.observed.iter().flatten();
                let ours = observed.map(|(key, _)| key).filter(|key| targets.contains_key(key));
                read.targets = ours.cloned().collect();
            }
            self.memory.tracking = Some(read);
        }
        Ok(())
    }

    /// Notes what is about to be registered before it is, and takes out what is neither wanted nor registered.
    async fn note(&mut self, register: &[Target], wanted: &Desired) -> Result<(), kube::Error> {
        let Some(tracking) = &mut self.memory.tracking else { return Ok(()) };
        let mut targets = tracking.targets.clone();
        let observed = self.memory.observed.as_ref();
        targets.retain(|key| {
            let seen = observed.and_then(|observed| observed.get(key));
            wanted.targets.contains_key(key) || seen.is_some_and(|seen| seen.state != TargetState::Draining)
        });
        targets.extend(register.iter().map(TargetKey::of));
        let answer = tracking.write(targets).await;
        if answer.is_err() {
            self.memory.tracking = None;
        }
        answer
    }

    /// Brings the readiness gates of the binding's pods up to date.
    async fn open_gates(&mut self, wanted: &Desired, group: &TargetGroup, writes: bool) {
        if !writes || group.binding_target_type() != Some(TargetType::Ip) {
            return;
        }
        let gates = {
            let observed = self.memory.observed.as_ref();
            let mut by_pod = BTreeMap::new();
            for (key, wanted) in &wanted.targets {
                if let Origin::Pod { key: pod, .. } = &wanted.origin {
                    by_pod.insert(pod, observed.and_then(|observed| observed.get(key)));
                }
            }
            let in_use = !group.load_balancer_arns.is_empty();
            let state = |pod: &Key| gates::state(by_pod.get(pod).copied().flatten(), in_use);
            gates::outdated(&self.ctx.index(), &self.key, state)
        };
        // Whether a load balancer is there decides over gates, so it must not be old news.
        let unused = gates.iter().any(|gate| gate.state.1 == "TargetGroupNotInUse");
        if unused && self.memory.group_read.is_some_and(|at| at.elapsed() > Duration::from_secs(5)) {
            self.memory.group = None;
            self.memory.next_poll = Some(Instant::now());
            return;
        }
        gates::write(&self.ctx, gates).await;
    }

    /// While pods wait for their gates, or old targets for new ones, health is read at 1 s, then 2, 4, 8, 15; while
    /// targets are new, somewhat earlier than usual.
    fn poll_soon(&mut self, targets: &BTreeMap<TargetKey, Target>, plan: &Plan) {
        const HURRIED: [u64; 5] = [1, 2, 4, 8, 15];
        const NEW: [u64; 5] = [2, 5, 10, 20, 40];
        let swaps = !plan.kept.is_empty() && !plan.keeps_last;
        let is_new = |key| {
            let observed = self.memory.observed.as_ref();
            observed
                .and_then(|observed| observed.get(key))
                .is_some_and(|seen| seen.state == TargetState::Initial)
        };
        let delays = if swaps || gates::waits(&self.ctx.index(), &self.key) {
            HURRIED.as_slice()
        } else if targets.keys().any(is_new) {
            NEW.as_slice()
        } else {
            return;
        };
        let delay = delays.get(self.memory.polls).or(delays.last()).copied().unwrap_or(15);
        let at = self.memory.touched.unwrap_or_else(Instant::now) + Duration::from_secs(delay);
        self.memory.next_poll = self.memory.next_poll.map(|next| next.min(at));
    }

    /// At first contact, what is registered and not of this cluster stays for one resync.
    fn foreign_at_first_contact(&mut self, binding: &TargetGroupBinding) -> BTreeSet<TargetKey> {
        let never_seen = binding.status.as_ref().is_none_or(|status| status.observed_generation.is_none());
        if never_seen && self.memory.first_contact.is_none() && self.memory.written.is_none() {
            self.memory.first_contact = Some(Instant::now());
        }
        let contact = self.memory.first_contact.is_some_and(|at| at.elapsed() < self.ctx.settings.resync);
        if !contact || binding.spec.target_group.sharing() == Sharing::Shared {
            return BTreeSet::new();
        }
        let index = self.ctx.index();
        let observed = self.memory.observed.iter().flatten();
        observed
            .filter(|(key, seen)| {
                seen.state != TargetState::Draining
                    && !self.memory.uids.contains_key(key)
                    && !is_of_cluster(&index, key)
            })
            .map(|(key, _)| key.clone())
            .collect()
    }

    fn plan(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        wanted: &Desired,
        targets: &BTreeMap<TargetKey, Target>,
        first_contact: &BTreeSet<TargetKey>,
    ) -> Plan {
        let index = self.ctx.index();
        let now = Instant::now();
        let empty = BTreeMap::new();
        let observed = self.memory.observed.as_ref().unwrap_or(&empty);
        let alive: BTreeSet<TargetKey> = observed
            .keys()
            .filter(|key| is_alive(&index, binding, key, self.memory.uids.get(key).map(String::as_str)))
            .cloned()
            .collect();
        let unwanted: BTreeSet<&TargetKey> = observed
            .iter()
            .filter(|(key, seen)| seen.state != TargetState::Draining && !targets.contains_key(key))
            .map(|(key, _)| key)
            .collect();
        self.memory.unwanted_since.retain(|key, _| unwanted.contains(key));
        for key in unwanted {
            self.memory.unwanted_since.entry(key.clone()).or_insert(now);
        }
        let unwanted_for = self
            .memory
            .unwanted_since
            .iter()
            .map(|(key, since)| (key.clone(), now.saturating_duration_since(*since)))
            .collect();
        self.memory.rejected.retain(|key, (until, _)| *until > now && targets.contains_key(key));
        let mut protected = wanted_by_others(&index, &self.ctx, binding, arn);
        protected.extend(first_contact.iter().cloned());
        let settings = &self.ctx.settings;
        let keep = match binding.annotation(names::WHEN_NONE_READY) {
            Some("keep") => true,
            Some("deregister") => false,
            _ => settings.keep_last.applies(self.memory.group.as_ref()),
        };
        let none_ready = wanted.missing.is_none() && targets.is_empty() && !wanted.unready.is_empty();
        plan(&Situation {
            desired: targets,
            observed,
            assumed: &self.memory.assumed,
            alive: &alive,
            tracked: self.memory.tracking.as_ref().map(|tracking| &tracking.targets),
            protected: &protected,
            rejected: &self.memory.rejected.keys().cloned().collect(),
            unwanted_for: &unwanted_for,
            grace: wanted.missing.as_ref().map(|_| settings.missing_backend_grace),
            keep_last: keep && none_ready,
            swap_grace: settings.swap_grace,
            max_targets: settings.max_targets,
        })
    }

    /// Registers, then deregisters; what AWS acknowledged becomes part of what is observed.
    async fn apply(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        wanted: &Desired,
        plan: &Plan,
        report: &mut Report,
    ) -> Outcome {
        if let Err(error) = self.note(&plan.register, wanted).await {
            report.bad(
                Kind::TargetsRegistered,
                Reason::RegistrationFailed,
                format!("the ConfigMap of targets: {error}"),
            );
            return Outcome::Failed;
        }
        let mut failed = None;
        let mut full = false;
        if let Err(error) = self.register(binding, arn, wanted, &plan.register).await {
            full = error.is_target_limit();
            failed = Some(error);
        }
        // A swap that makes room comes first only when AWS says that there is none.
        let go_on = failed.as_ref().is_none_or(|error| full || error.class() == Class::Terminal);
        if go_on && !plan.deregister.is_empty() {
            if let Err(error) = self.deregister(binding, arn, &plan.deregister).await {
                failed.get_or_insert(error);
            } else if full {
                let left: Vec<Target> = plan
                    .register
                    .iter()
                    .filter(|target| !self.is_registered(&TargetKey::of(target)))
                    .cloned()
                    .collect();
                failed = self.register(binding, arn, wanted, &left).await.err();
            }
        }
        let Some(error) = failed else { return Outcome::Done(None) };
        warn!(binding = %self.key, %error, "could not change targets");
        self.memory.next_poll = None;
        if error.is_target_group_not_found() {
            self.memory.group = None;
        }
        let reason =
            if error.is_target_limit() { Reason::TargetLimitReached } else { Reason::RegistrationFailed };
        report.bad(Kind::TargetsRegistered, reason, error.to_string());
        Outcome::Failed
    }

    async fn register(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        wanted: &Desired,
        targets: &[Target],
    ) -> Result<(), AwsError> {
        let role = binding.spec.target_group.role();
        let mut batches: Vec<Vec<Target>> = targets.chunks(BATCH).map(<[Target]>::to_vec).collect();
        batches.reverse();
        let mut calls = 0;
        let mut failed = None;
        while let Some(batch) = batches.pop() {
            if calls == CALLS + targets.len() / BATCH {
                break;
            }
            calls += 1;
            let error = match self.ctx.aws.register(role, arn, &batch).await {
                Ok(()) => {
                    info!(binding = %self.key, targets = batch.len(), "registered");
                    if let Some(since) = self.changed {
                        self.ctx.metrics.change_to_register.observe(since.elapsed().as_secs_f64());
                    }
                    self.count("registered", batch.len());
                    let keys: Vec<TargetKey> = batch.iter().map(TargetKey::of).collect();
                    self.ctx.events.normal(binding, EventReason::Registered, listed(&keys));
                    self.registered(wanted, batch);
                    continue;
                }
                Err(error) => error,
            };
            let is_about_targets = matches!(error.code.as_str(), "InvalidTarget" | "ValidationError");
            if !is_about_targets {
                return Err(error);
            }
            let (bad, good): (Vec<Target>, Vec<Target>) =
                batch.into_iter().partition(|target| names_id(&error.message, &target.id));
            if bad.is_empty() && good.len() > 1 {
                let (left, right) = good.split_at(good.len() / 2);
                batches.extend([right.to_vec(), left.to_vec()]);
                continue;
            }
            let (bad, good) = if bad.is_empty() { (good, bad) } else { (bad, good) };
            let until = Instant::now() + self.ctx.settings.health_poll;
            for target in bad {
                self.memory.rejected.insert(TargetKey::of(&target), (until, error.to_string()));
            }
            if !good.is_empty() {
                batches.push(good);
            }
            debug!(binding = %self.key, %error, "targets refused");
            if self.memory.rejected.is_empty() {
                failed = Some(error);
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn registered(&mut self, wanted: &Desired, batch: Vec<Target>) {
        for target in batch {
            let key = TargetKey::of(&target);
            if let Some(Origin::Pod { uid, .. }) = wanted.targets.get(&key).map(|wanted| &wanted.origin) {
                self.memory.uids.insert(key.clone(), uid.clone());
            }
            let seen =
                ObservedTarget { target, state: TargetState::Initial, reason: None, description: None };
            (self.memory.touched, self.memory.polls) = (Some(Instant::now()), 0);
            self.memory.assumed.insert(key.clone());
            self.memory.observed.get_or_insert_default().insert(key, seen);
        }
    }

    fn count(&self, result: &'static str, targets: usize) {
        let counter = self.ctx.metrics.changes.get_or_create(&metrics::Result { result }).clone();
        counter.inc_by(u64::try_from(targets).unwrap_or(u64::MAX));
    }

    fn is_registered(&self, key: &TargetKey) -> bool {
        let observed = self.memory.observed.as_ref();
        observed
            .and_then(|observed| observed.get(key))
            .is_some_and(|seen| seen.state != TargetState::Draining)
    }

    async fn deregister(
        &mut self,
        binding: &TargetGroupBinding,
        arn: &str,
        targets: &[Target],
    ) -> Result<(), AwsError> {
        for batch in targets.chunks(BATCH) {
            let answer = self.ctx.aws.deregister(binding.spec.target_group.role(), arn, batch).await;
            match answer {
                // None of them is registered there any more.
                Err(error) if error.code == "InvalidTarget" => {}
                other => other?,
            }
            info!(binding = %self.key, targets = batch.len(), "deregistered");
            self.count("deregistered", batch.len());
            let keys: Vec<TargetKey> = batch.iter().map(TargetKey::of).collect();
            self.ctx.events.normal(binding, EventReason::Deregistered, listed(&keys));
            for target in batch {
                let key = TargetKey::of(target);
                self.memory.uids.remove(&key);
                if let Some(seen) = self.memory.observed.get_or_insert_default().get_mut(&key) {
                    seen.state = TargetState::Draining;
                }
            }
        }
        Ok(())
    }

    fn report_targets(
        &self,
        wanted: &Desired,
        targets: &BTreeMap<TargetKey, Target>,
        plan: &Plan,
        foreign: &BTreeSet<TargetKey>,
        report: &mut Report,
    ) {
        let empty = BTreeMap::new();
        let observed = self.memory.observed.as_ref().unwrap_or(&empty);
        let count = |state: fn(TargetState) -> bool| {
            let found = targets.keys().filter_map(|key| observed.get(key)).filter(|seen| state(seen.state));
            u32::try_from(found.count()).unwrap_or(u32::MAX)
        };
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (all, healthy) = (number(targets.len()), count(|state| state == TargetState::Healthy));
        let registered = count(|state| state != TargetState::Draining);
        report.targets = Some(TargetCounts {
            desired: all,
            registered,
            healthy,
            unhealthy: count(|state| state == TargetState::Unhealthy),
            draining: number(observed.values().filter(|seen| seen.state == TargetState::Draining).count()),
            summary: format!("{healthy}/{all}"),
            observed_at: None,
            other: BTreeMap::new(),
        });
        let left_out = match wanted.left_out.is_empty() {
            true => String::new(),
            false => format!("; left out: {}", wanted.left_out.join(", ")),
        };
        if let Some((key, (_, why))) = self.memory.rejected.first_key_value() {
            let others = self.memory.rejected.len() - 1;
            report.bad(
                Kind::TargetsRegistered,
                Reason::TargetsRejected,
                format!("AWS refuses {key} and {others} others: {why}{left_out}"),
            );
        }
        if plan.no_room > 0 {
            let message =
                format!("{} targets more than --max-targets-per-target-group{left_out}", plan.no_room);
            report.bad(Kind::TargetsRegistered, Reason::TargetLimitReached, message);
        }
        if let Some(first) = foreign.first() {
            report.bad(
                Kind::TargetsRegistered,
                Reason::ForeignTargets,
                format!(
                    "{} targets that are not this cluster's were registered before this binding, as {first}; they \
                     are left alone until the next resync",
                    foreign.len()
                ),
            );
        }
        if plan.keeps_last {
            let message = format!(
                "no endpoint is ready although pods run; the last {} targets stay{left_out}",
                plan.kept.len()
            );
            report.bad(Kind::TargetsRegistered, Reason::BackendUnready, message);
        }
        report.ok(
            Kind::TargetsRegistered,
            Reason::Registered,
            format!("{registered} of {all} targets are registered{left_out}"),
        );
    }

    /// Undoes what the binding did, and lets it go. Whether that is done.
    async fn clean_up(&mut self, binding: &Arc<TargetGroupBinding>, report: &mut Report) -> bool {
        let retain = binding.annotation(names::ON_DELETE) == Some("retain");
        let release = binding.annotation(names::RELEASE) == Some("true");
        let arn = binding.spec.target_group.arn().or_else(|| resolved_arn(binding)).map(str::to_owned);
        let mut outcome = Ok(());
        if let (Some(arn), false, false) = (&arn, retain, self.ctx.settings.observe) {
            outcome = self.deregister_all(binding, arn).await;
        }
        if outcome.is_ok() && binding.spec.networking.is_some() && !self.ctx.settings.observe {
            outcome = security::drop_claim(&self.ctx, &self.key).await;
        }
        if let Err(error) = outcome {
            warn!(binding = %self.key, %error, "clean-up failed");
            report.cleanup_failed = Some(error.to_string());
            let since = *self.memory.cleanup_since.get_or_insert_with(Instant::now);
            let late = self.ctx.settings.cleanup_deadline.is_some_and(|most| since.elapsed() >= most);
            if !release && !late {
                return false;
            }
        }
        let gates = gates::outdated(&self.ctx.index(), &self.key, |_| gates::of_a_deleted_binding());
        if !self.ctx.settings.observe && !gates::write(&self.ctx, gates).await && !release {
            report.cleanup_failed = Some("could not open the readiness gates".to_owned());
            return false;
        }
        match self.set_finalizer(binding, false).await {
            Ok(()) => true,
            Err(error) => {
                report.cleanup_failed = Some(error.to_string());
                false
            }
        }
    }

    async fn deregister_all(&mut self, binding: &TargetGroupBinding, arn: &str) -> Result<(), AwsError> {
        // A binding that never owned the group registered nothing.
        if resolved_arn(binding).is_none() && self.memory.observed.is_none() {
            return Ok(());
        }
        let role = binding.spec.target_group.role();
        // What was foreign at first contact is not ours to take away either.
        let foreign = self.foreign_at_first_contact(binding);
        let seen = match self.ctx.aws.target_health(role, arn).await {
            Err(error) if error.is_target_group_not_found() => return Ok(()),
            other => other?,
        };
        let tracking = match binding.spec.target_group.sharing() {
            Sharing::Shared => match Tracking::read(self.ctx.client.clone(), &self.key).await {
                Ok(tracking) => Some(tracking),
                Err(error) => return Err(cluster_error(&error)),
            },
            Sharing::Exclusive => None,
        };
        let ours: Vec<Target> = {
            let index = self.ctx.index();
            let protected = wanted_by_others(&index, &self.ctx, binding, arn);
            let was_loser = index.bindings_of(arn).iter().any(|other| {
                !other.is_terminating()
                    && other.metadata.creation_timestamp.as_ref().map(|time| time.0)
                        < binding.metadata.creation_timestamp.as_ref().map(|time| time.0)
            });
            seen.iter()
                .filter(|seen| seen.state != TargetState::Draining)
                .map(|seen| &seen.target)
                .filter(|target| {
                    let key = TargetKey::of(target);
                    !protected.contains(&key)
                        && match &tracking {
                            Some(tracking) => tracking.targets.contains(&key),
                            None => !was_loser && !foreign.contains(&key),
                        }
                })
                .cloned()
                .collect()
        };
        match self.deregister(binding, arn, &ours).await {
            Err(error) if error.is_target_group_not_found() => {}
            other => other?,
        }
        match tracking {
            Some(tracking) => tracking.delete().await.map_err(|error| cluster_error(&error)),
            None => Ok(()),
        }
    }

    async fn set_finalizer(&self, binding: &TargetGroupBinding, wanted: bool) -> Result<(), kube::Error> {
        let mut finalizers = binding.metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|entry| entry != names::FINALIZER);
        if wanted {
            finalizers.push(names::FINALIZER.to_owned());
        }
        let version = self.current_version(binding);
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": version}});
        let api: Api<TargetGroupBinding> = Api::namespaced(self.ctx.client.clone(), &self.key.namespace);
        let answer = api.patch(&self.key.name, &PatchParams::default(), &Patch::Merge(&patch)).await;
        match answer {
            Ok(_) => Ok(()),
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The newest resourceVersion that is known: our own last write's, until the watch has shown it.
    fn current_version(&self, binding: &TargetGroupBinding) -> Option<String> {
        let seen = binding.metadata.resource_version.clone();
        match &self.memory.written {
            Some(written) if written.sent_version == seen => written.version.clone(),
            _ => seen,
        }
    }

    /// Writes the status if it differs from what is there; `Some` if that must be tried again.
    async fn write_status(&mut self, binding: &TargetGroupBinding, report: &Report) -> Option<Duration> {
        let old = match &self.memory.written {
            Some(written) if written.sent_version == binding.metadata.resource_version => {
                Some(&written.status)
            }
            _ => binding.status.as_ref(),
        };
        let now = Time(k8s_openapi::jiff::Timestamp::now());
        let mut new = status::status(report, old, binding.metadata.generation, now.clone());
        let substance = old.is_none_or(|old| status::differs_in_substance(old, &new));
        let old_counts = old.and_then(|old| old.targets.clone());
        if let Some(counts) = &mut new.targets {
            counts.observed_at = old_counts.as_ref().and_then(|counts| counts.observed_at.clone());
        }
        if !substance && old_counts == new.targets {
            return None;
        }
        if let Some(counts) = &mut new.targets {
            counts.observed_at = Some(now.0.strftime("%Y-%m-%dT%H:%M:%SZ").to_string());
        }
        let since = self.memory.written.as_ref().map(|written| written.at.elapsed());
        if let (false, Some(since)) = (substance, since.filter(|since| *since < COUNTS_EVERY)) {
            return Some(COUNTS_EVERY - since);
        }
        let version = self.current_version(binding);
        let patch = json!({"metadata": {"resourceVersion": version}, "status": new});
        let api: Api<TargetGroupBinding> = Api::namespaced(self.ctx.client.clone(), &self.key.namespace);
        match api.patch_status(&self.key.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(answer) => {
                self.memory.written = Some(Written {
                    sent_version: binding.metadata.resource_version.clone(),
                    version: answer.metadata.resource_version,
                    status: new,
                    at: Instant::now(),
                });
                None
            }
            Err(kube::Error::Api(status)) if status.is_not_found() => None,
            Err(error) => {
                let is_conflict = matches!(&error, kube::Error::Api(status) if status.is_conflict());
                if is_conflict {
                    self.memory.written = None;
                } else {
                    warn!(binding = %self.key, %error, "could not write the status");
                }
                Some(if is_conflict { Duration::from_millis(200) } else { BACKOFF_FIRST })
            }
        }
    }
}

/// A failure of the cluster among those of AWS, for the clean-up's report.
fn cluster_error(error: &kube::Error) -> AwsError {
    AwsError { operation: "ConfigMap", code: "ClusterError".to_owned(), message: error.to_string() }
}

/// What the other living bindings of a target group want there.
fn wanted_by_others(
    index: &Index,
    ctx: &Ctx,
    binding: &TargetGroupBinding,
    arn: &str,
) -> BTreeSet<TargetKey> {
    let Ok(parsed) = TargetGroupArn::parse(arn) else { return BTreeSet::new() };
    let others = index.bindings_of(arn).into_iter().filter(|other| {
        !other.is_terminating() && (other.namespace(), other.name()) != (binding.namespace(), binding.name())
    });
    others
        .flat_map(|other| {
            let reference = &other.spec.target_group;
            let group = TargetGroup {
                arn: parsed.clone(),
                target_type: reference.target_type.map(|word| word.as_str()).unwrap_or("ip").to_owned(),
                protocol: reference.protocol.map(|word| word.as_str()).unwrap_or_default().to_owned(),
                ip_address_type: reference
                    .ip_address_type
                    .map(|word| word.as_str())
                    .unwrap_or_default()
                    .to_owned(),
                vpc_id: None,
                port: None,
                health_check_port: None,
                load_balancer_arns: Vec::new(),
            };
            desired(index, other, &group, &ctx.settings.switches).targets.into_keys()
        })
        .collect()
}

/// The first rule among those that are enforced here again which refuses the binding: reason and sentence. What the
/// backend has to do with is [`crate::desired`]'s, ownership is [`Worker::owner`]'s.
fn refused(
    ctx: &Ctx,
    binding: &TargetGroupBinding,
    group: Option<&TargetGroup>,
    tags: Option<&BTreeMap<String, String>>,
) -> Option<(Reason, String)> {
    let context = rules::Context {
        target_group: group.map_or(rules::Lookup::Unknown, rules::Lookup::Found),
        tags,
        ..Default::default()
    };
    let found = rules::check(rules::Operation::Create, binding, None, &context, &ctx.settings.rules);
    let mut frozen = found
        .into_iter()
        .filter(|finding| finding.severity == rules::Severity::Deny && rules::FROZEN.contains(&finding.rule));
    frozen.next().map(|finding| {
        let reason = match finding.rule {
            "TGB101" | "TGB102" => Reason::InvalidSpec,
            "TGB110" => Reason::TargetGroupNotFound,
            "TGB111" | "TGB112" => Reason::TargetTypeMismatch,
            _ => Reason::NotAllowed,
        };
        (reason, format!("{} {}", finding.rule, finding.message))
    })
}

/// The reason of `TargetGroupResolved=False`, and whether waiting does not help.
fn reason_of(error: &AwsError) -> (Reason, bool) {
    if error.is_target_group_not_found() {
        (Reason::TargetGroupNotFound, true)
    } else if error.is_access_denied() {
        (Reason::AccessDenied, true)
    } else {
        (Reason::AwsUnavailable, false)
    }
}

/// Whether AWS's sentence names a target as a whole word.
fn names_id(message: &str, id: &str) -> bool {
    let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
    message.match_indices(id).any(|(at, found)| {
        let before = message.get(..at).and_then(|text| text.chars().next_back());
        let after = message.get(at + found.len()..).and_then(|text| text.chars().next());
        !before.is_some_and(is_part) && !after.is_some_and(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}
