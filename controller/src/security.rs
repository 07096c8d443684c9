//! Security groups: keeps every binding's claim, and one writer per group, which drives one [`Pass`] after another.
//! Different groups are written side by side.

pub(crate) mod interfaces;

use self::interfaces::{REMEMBERED, security_groups, sites};
use crate::claims::{Asked, Group, Held, Progress};
use crate::context::Ctx;
use crate::desired::{TargetKey, Wanted};
use crate::events::first_few;
use crate::group::{Answer, Known, Pass, Retained, State, Step, Wish, is_open, overlap};
use crate::index::{Concerned, Key};
use crate::kept::Listed;
use crate::network::{self, Claim, anywhere, permissions, unresolved};
use crate::reason::{Kind, Reason};
use crate::reconcile::backoff;
use crate::status::Report;
use futures::future::join_all;
use kube::Api;
use kube::api::ListParams;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tgb_api::names;
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::values::{Permission, Rule, Source};
use tgb_aws::{AwsError, Class};
use tokio::time::Instant;
use tracing::{error, info, warn};

/// The period at which a group is read that leans on somebody else's rule; one that failed is tried again sooner.
const AGAIN: Duration = Duration::from_secs(60);
/// The period of the search for rules of ours that no binding wants.
const SEARCH: Duration = Duration::from_secs(3600);
/// Bindings per page of a list.
const PAGE: u32 = 500;

/// The state of a binding's rules.
#[derive(Debug, PartialEq)]
enum Standing {
    /// All are there; `widened` ranges open more than it asked for, and `stale` tells of rules that could not be taken away.
    Authorized {
        widened: BTreeSet<String>,
        stale: Option<(Reason, String)>,
    },
    Pending(String),
    Failed(Reason, String),
}

/// The knowledge of a binding's targets at the time its rules are looked at.
pub(crate) enum Sight<'a> {
    /// The targets; `lingers` if others of the binding are still registered or draining.
    Targets { wanted: &'a BTreeMap<TargetKey, Wanted>, vpc: Option<&'a str>, lingers: bool },
    /// No target for now, or the binding can't be resolved for good: it keeps the rules that it had.
    Nothing,
    /// Not known for want of data.
    Unknown,
    /// The binding is paused: nothing is written for it.
    Paused,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Puts down what a binding wants of security groups and reports how its rules stand; after a change, what failed is
/// tried again at once. `false` if that must be tried again soon.
pub(crate) async fn bring(
    ctx: &Arc<Ctx>,
    key: &Key,
    binding: &TargetGroupBinding,
    (sight, changed): (Sight<'_>, bool),
    report: &mut Report,
) -> bool {
    if binding.spec.networking.is_none() {
        put_claim(ctx, key, Claim::default(), &BTreeSet::new());
        return true;
    }
    let assumed = anywhere(&binding.spec);
    let old = lock(&ctx.security.claims).get(key).map(|held| Arc::clone(&held.claim));
    let old = old.as_deref();
    let mut is_done = true;
    let (nothing, unknown) = ("the rules that there are stay", "the security groups are not known yet");
    let (claim, otherwise) = match sight {
        Sight::Targets { wanted, vpc, lingers } => match found(ctx, binding, wanted, vpc).await {
            Ok(Rules { rules, problem, lost }) => {
                is_done = !lost;
                let keeps_all = lingers || problem.is_some();
                if let Some((reason, message)) = problem {
                    report.bad(Kind::NetworkingReady, reason, message);
                }
                let keep = if keeps_all { assumed.clone() } else { BTreeSet::new() };
                (Claim { rules, keep, ..Claim::default() }, Some("no target has a security group"))
            }
            Err(error) => {
                report.bad(Kind::NetworkingReady, reason_of(&error), error.to_string());
                is_done = false;
                (kept(old, &assumed), None)
            }
        },
        Sight::Nothing => (kept(old, &assumed), Some(nothing)),
        Sight::Unknown => (kept(old, &assumed), None),
        Sight::Paused => (paused(old, &assumed), Some(nothing)),
    };
    let groups: Vec<String> = claim.rules.keys().cloned().collect();
    put_claim(ctx, key, claim, &assumed);
    let standing = standing(ctx, key);
    if changed && matches!(standing, Standing::Failed(..)) {
        for group in &groups {
            ask(ctx, group, true);
        }
    }
    match standing {
        Standing::Failed(reason, message) => report.bad(Kind::NetworkingReady, reason, message),
        Standing::Pending(message) => report.unknown(Kind::NetworkingReady, Reason::Pending, message),
        Standing::Authorized { widened, stale } => {
            report.stale_rules.clone_from(&stale);
            match if groups.is_empty() { otherwise } else { Some("") } {
                None => report.unknown(Kind::NetworkingReady, Reason::Pending, unknown),
                Some(words) => {
                    let message = authorized(groups.len(), words, widened, stale);
                    report.ok(Kind::NetworkingReady, Reason::Authorized, message);
                }
            }
        }
    }
    is_done
}

/// The claim of a binding whose targets are not known: what it had, as far as its spec still asks for it, and nothing that
/// its spec could ask for is taken away.
fn kept(old: Option<&Claim>, assumed: &BTreeSet<Permission>) -> Claim {
    let mut rules = old.map(|old| old.rules.clone()).unwrap_or_default();
    for permissions in rules.values_mut() {
        permissions.retain(|had| is_open(had, assumed));
    }
    rules.retain(|_, permissions| !permissions.is_empty());
    Claim { rules, keep: assumed.clone(), ..Claim::default() }
}

/// The claim of a paused binding: everything stays as it is.
fn paused(old: Option<&Claim>, assumed: &BTreeSet<Permission>) -> Claim {
    let mut keep = assumed.clone();
    if let Some(old) = old {
        keep.extend(old.rules.values().flatten().chain(&old.keep).cloned());
    }
    Claim::keeping(keep)
}

/// Puts down what a binding wants, and sets the writers of the groups concerned to work. What was not put down yet counted as
/// `assumed`.
pub(crate) fn put_claim(ctx: &Arc<Ctx>, key: &Key, claim: Claim, assumed: &BTreeSet<Permission>) {
    let concerned = {
        let mut claims = lock(&ctx.security.claims);
        let old = claims.get(key);
        if old.is_some_and(|old| *old.claim == claim) {
            return;
        }
        let mut concerned: BTreeSet<String> = claim.rules.keys().cloned().collect();
        let mut left = BTreeSet::new();
        if let Some(old) = old {
            concerned.extend(old.claim.rules.keys().cloned());
            let groups = lock(&ctx.security.groups);
            left.extend(old.left.iter().filter(|id| groups.contains_key(*id)).cloned());
            left.extend(old.claim.rules.keys().cloned());
            left.retain(|id| !claim.rules.contains_key(id));
        }
        // What was kept for want of this claim may go now.
        let kept = old.map_or(assumed, |old| &old.claim.keep);
        concerned.extend(holders(ctx, kept.difference(&claim.keep)));
        claims.insert(key.clone(), Held { claim: Arc::new(claim), left, dropped: None });
        concerned
    };
    for group in concerned {
        ask(ctx, &group, false);
    }
}

/// The end of a binding's rules.
pub(crate) struct Dropped {
    /// The groups in which rules stay, and their description.
    pub(crate) retained: Option<(Vec<String>, String)>,
}

/// Takes a binding's claim away, and waits until the rules that only it wanted are gone, or until those that it used are
/// described as retained. Only groups that hold such rules are waited for.
///
/// # Errors
/// The answer of AWS about the first group that could not be done.
pub(crate) async fn drop_claim(
    ctx: &Arc<Ctx>,
    key: &Key,
    binding: &TargetGroupBinding,
    retains: bool,
) -> Result<Dropped, AwsError> {
    // Before the search has ended, not all groups with rules of ours are known. If it takes long, it will find the rules itself.
    let mut searched = ctx.security.searched.subscribe();
    let _ = tokio::time::timeout(Duration::from_secs(10), searched.wait_for(|done| *done)).await;
    let description = network::retained_marker(&marker(ctx), &key.to_string());
    let had = {
        let mut claims = lock(&ctx.security.claims);
        let assumed = || Held { claim: Arc::new(Claim::keeping(anywhere(&binding.spec))), ..Held::default() };
        let held = claims.entry(key.clone()).or_insert_with(assumed);
        let had = Arc::clone(held.dropped.get_or_insert_with(|| Arc::clone(&held.claim)));
        held.claim = Arc::new(match retains {
            true => Claim { retained_as: Some(description.clone()), ..(*had).clone() },
            false => Claim::default(),
        });
        had
    };
    let mut concerned = holders(ctx, &had.keep);
    concerned.extend(had.rules.keys().cloned());
    let settled = join_all(concerned.iter().map(|id| settled(ctx, id, false))).await;
    for (id, progress) in concerned.iter().zip(&settled) {
        if let Some(error) = hindered(progress, id, &had, retains) {
            return Err(AwsError { message: format!("{} (security group {id})", error.message), ..error });
        }
    }
    let is_retained = |(id, progress): &(&String, &Progress)| {
        progress.state.as_ref().is_some_and(|state| overlap(had.used(id), &state.rules))
    };
    let retained: Vec<String> =
        concerned.iter().zip(&settled).filter(is_retained).map(|(id, _)| id.clone()).collect();
    lock(&ctx.security.claims).insert(key.clone(), Held::default());
    Ok(Dropped {
        retained: Some((retained, description)).filter(|(groups, _)| retains && !groups.is_empty()),
    })
}

/// The error that keeps a group from being done for a binding that ends: one that leaves rules of ours there which no other
/// binding wants, or after which it is not known if there are any.
fn hindered(progress: &Progress, id: &str, had: &Claim, retains: bool) -> Option<AwsError> {
    let state = progress.state.as_ref()?;
    if let Some((rules, error)) = &state.unretained
        && overlap(had.used(id), rules)
    {
        return Some(error.clone());
    }
    let error = state.error.as_ref()?;
    let left = match (&state.ours, retains) {
        (None, _) => &progress.ours,
        (Some(ours), true) => ours,
        (Some(_), false) => &state.stale,
    };
    let is_open = error.class() != Class::Terminal && had.rules.contains_key(id);
    (is_open || overlap(had.used(id), left)).then(|| error.clone())
}

/// Forgets a binding that is gone; its rules go, too.
pub(crate) fn forget(ctx: &Arc<Ctx>, key: &Key) {
    let Some(old) = lock(&ctx.security.claims).remove(key) else { return };
    let mut concerned = holders(ctx, &old.claim.keep);
    concerned.extend(old.claim.rules.keys().cloned());
    for group in concerned {
        ask(ctx, &group, false);
    }
}

/// Looks at every group again that could not be done, as when AWS answers again.
pub(crate) fn retry(ctx: &Arc<Ctx>) {
    let is_failed = |group: &Group| {
        let progress = group.progress.borrow();
        progress.state.as_ref().is_none_or(|state| is_failed(state))
    };
    let failed: Vec<String> = {
        let groups = lock(&ctx.security.groups);
        groups.iter().filter(|(_, group)| is_failed(group)).map(|(id, _)| id.clone()).collect()
    };
    for id in failed {
        ask(ctx, &id, true);
    }
}

/// At start and every hour: groups of the VPC that have rules of ours are looked at, whether or not a binding still
/// names them.
pub(crate) async fn search(ctx: Arc<Ctx>) {
    loop {
        let mut again = SEARCH;
        match find(&ctx).await {
            Ok(found) => {
                for (id, ours) in found {
                    let (group, _) = ask(&ctx, &id, true);
                    group.progress.send_if_modified(|progress| {
                        let is_new = progress.state.is_none();
                        if is_new {
                            progress.ours = ours;
                        }
                        is_new
                    });
                }
            }
            Err(error) => {
                warn!(%error, "could not look for security groups with rules of ours");
                again = Duration::from_secs(300);
            }
        }
        ctx.security.searched.send_replace(true);
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            () = tokio::time::sleep(again) => {}
        }
    }
}

/// The number of rules of ours that no binding wants and that could not be taken away.
pub(crate) fn stale_rules(ctx: &Ctx) -> usize {
    let groups = lock(&ctx.security.groups);
    let of = |group: &Arc<Group>| {
        let progress = group.progress.borrow();
        progress.state.as_ref().filter(|state| state.error.is_some()).map_or(0, |state| state.stale.len())
    };
    groups.values().map(of).sum()
}

// ---- what a binding asks for ----

/// The rules that the targets of a binding need.
struct Rules {
    rules: BTreeMap<String, BTreeSet<Permission>>,
    /// The reason and sentence of `NetworkingReady=False`.
    problem: Option<(Reason, String)>,
    /// Something was not found at EC2 that may be there soon.
    lost: bool,
}

async fn found(
    ctx: &Ctx,
    binding: &TargetGroupBinding,
    targets: &BTreeMap<TargetKey, Wanted>,
    vpc: Option<&str>,
) -> Result<Rules, AwsError> {
    let sites = sites(&ctx.index(), targets);
    let (groups, mut problem) = security_groups(ctx, &sites, vpc).await?;
    let lost = problem.is_some();
    if !sites.is_empty() && problem.is_none() {
        let pods = sites.iter().filter_map(|site| site.ports.as_ref());
        problem = unresolved(&binding.spec, pods).map(|message| (Reason::PortNotFound, message));
    }
    let rules = groups.into_iter().map(|(id, ports)| (id, permissions(&binding.spec, ports.iter())));
    Ok(Rules { rules: rules.collect(), problem, lost })
}

/// The cluster's VPC: as given, as the instance metadata service says, or that of a node.
async fn vpc(ctx: &Ctx) -> Result<Option<String>, AwsError> {
    if let Some(vpc) = ctx.aws.find_vpc_id().await {
        return Ok(Some(vpc.to_owned()));
    }
    let ids: BTreeSet<String> = {
        let index = ctx.index();
        index.nodes.values().filter_map(|node| node.instance_id()).take(20).map(str::to_owned).collect()
    };
    let found = interfaces::instances(ctx, ids, REMEMBERED).await?;
    Ok(found.values().flat_map(|all| all.iter()).find_map(|interface| interface.vpc_id.clone()))
}

/// The VPC's groups that have rules of ours, and these.
async fn find(ctx: &Ctx) -> Result<BTreeMap<String, BTreeSet<Permission>>, AwsError> {
    let Some(vpc) = vpc(ctx).await? else { return Ok(BTreeMap::new()) };
    let marker = marker(ctx);
    let adopt = ctx.settings.adopt_unmarked_rules;
    let is_ours = |text: &str| text == marker || (adopt && text == names::RULE_DESCRIPTION);
    ctx.aws.security_groups_with_rules(&vpc, is_ours).await
}

fn marker(ctx: &Ctx) -> String {
    network::marker(&ctx.settings.cluster_name, ctx.settings.rule_owner.as_deref())
}

/// The groups that hold rules of ours which open something of these.
fn holders<'a>(ctx: &Ctx, permissions: impl IntoIterator<Item = &'a Permission> + Clone) -> BTreeSet<String> {
    let groups = lock(&ctx.security.groups);
    let held = groups.iter().filter(|(_, group)| {
        let progress = group.progress.borrow();
        overlap(permissions.clone(), &progress.ours)
    });
    held.map(|(id, _)| id.clone()).collect()
}

// ---- how it stands ----

/// The state of a binding's rules in all groups.
fn standing(ctx: &Ctx, key: &Key) -> Standing {
    let (claim, left) = {
        let claims = lock(&ctx.security.claims);
        let held = claims.get(key);
        held.map(|held| (Arc::clone(&held.claim), held.left.clone())).unwrap_or_default()
    };
    let mut pending = None;
    let (mut widened, mut stale) = (BTreeSet::new(), None);
    for id in claim.rules.keys().chain(&left) {
        let group = lock(&ctx.security.groups).get(id).cloned();
        let state = group.and_then(|group| group.progress.borrow().state.clone());
        match standing_in(&claim, id, state.as_deref()) {
            Standing::Failed(reason, message) => return Standing::Failed(reason, message),
            Standing::Pending(message) => pending = Some(message),
            Standing::Authorized { widened: more, stale: other } => {
                widened.extend(more);
                stale = stale.or(other);
            }
        }
    }
    pending.map_or(Standing::Authorized { widened, stale }, Standing::Pending)
}

/// The state of a claim's rules in one group.
fn standing_in(claim: &Claim, id: &str, state: Option<&State>) -> Standing {
    let not_yet = || Standing::Pending("the security groups are not done yet".to_owned());
    let mut wanted = claim.wanted(id).peekable();
    let is_wanted = wanted.peek().is_some();
    let Some(state) = state else {
        // A group that it left, and that nobody looks at any more, is none of its business.
        return if is_wanted {
            not_yet()
        } else {
            Standing::Authorized { widened: BTreeSet::new(), stale: None }
        };
    };
    let mut pending = None;
    for permission in wanted.filter(|asked| !is_open(asked, &state.rules)) {
        let failure = state.failed.iter().find(|(failed, _)| is_open(permission, [*failed]));
        match (failure.map(|(_, error)| error).or(state.error.as_ref()), state.withheld) {
            (Some(error), _) => {
                let message = format!("{id}, {}: {error}", shown(permission));
                return Standing::Failed(reason_of(error), message);
            }
            (None, Some((add, revoke))) => {
                let message = format!("would add {add} rules to {id} and take away {revoke}");
                pending = Some(Standing::Pending(message));
            }
            (None, None) => pending = Some(not_yet()),
        }
    }
    let uses = |wide: &&Permission| claim.wanted(id).any(|asked| is_open(asked, [*wide]));
    let widened = state.widened.iter().filter(uses).map(|wide| format!("{id} {}", shown(wide)));
    let stale = state.error.as_ref().filter(|_| !state.stale.is_empty()).map(|error| {
        let rules: Vec<String> = state.stale.iter().map(shown).collect();
        let message = format!("{id} still opens what nobody asks for ({}): {error}", first_few(&rules));
        (reason_of(error), message)
    });
    pending.unwrap_or(Standing::Authorized { widened: widened.collect(), stale })
}

/// The sentence of `NetworkingReady=True`.
fn authorized(
    groups: usize,
    otherwise: &str,
    widened: BTreeSet<String>,
    stale: Option<(Reason, String)>,
) -> String {
    let mut message = match groups {
        0 => otherwise.to_owned(),
        1 => "1 security group has the rules".to_owned(),
        groups => format!("{groups} security groups have the rules"),
    };
    if !widened.is_empty() {
        let widened: Vec<String> = widened.into_iter().collect();
        message.push_str("; widened for want of room: ");
        message.push_str(&widened.join(", "));
    }
    if let Some((_, stale)) = stale {
        message.push_str("; ");
        message.push_str(&stale);
    }
    message
}

/// The reason that `NetworkingReady` gives for an error.
fn reason_of(error: &AwsError) -> Reason {
    match error.code.as_str() {
        "RulesPerSecurityGroupLimitExceeded" => Reason::RuleLimitExceeded,
        "InvalidGroup.NotFound" | "InvalidGroupId.Malformed" | "InvalidSecurityGroupID.NotFound" => {
            Reason::SecurityGroupNotFound
        }
        UNLISTED => Reason::Pending,
        _ if error.is_access_denied() => Reason::AccessDenied,
        _ if error.class() == Class::Terminal => Reason::RulesRejected,
        _ => Reason::AwsUnavailable,
    }
}

/// `tcp 80-90 from sg-1`
fn shown(permission: &Permission) -> String {
    let Permission { protocol, from_port, to_port, source } = permission;
    let source = match source {
        Source::SecurityGroup(id) => id,
        Source::Cidr(cidr) => cidr,
    };
    let ports = if from_port == to_port { from_port.to_string() } else { format!("{from_port}-{to_port}") };
    format!("{} {ports} from {source}", protocol.as_str())
}

// ---- writers ----

/// Asks a group's writer for a pass, which may go on from what is remembered unless it is to read the group `afresh`. The
/// writer, and the number under which the pass is done.
fn ask(ctx: &Arc<Ctx>, id: &str, afresh: bool) -> (Arc<Group>, u64) {
    let mut groups = lock(&ctx.security.groups);
    let group = groups.get(id).cloned().unwrap_or_else(|| {
        let group = Arc::new(Group::default());
        groups.insert(id.to_owned(), Arc::clone(&group));
        tokio::spawn(keep(Arc::clone(ctx), id.to_owned(), Arc::clone(&group)));
        group
    });
    let mut number = 0;
    group.asked.send_modify(|asked| {
        asked.times += 1;
        asked.afresh += u64::from(afresh);
        number = asked.times;
    });
    (group, number)
}

/// Asks a group's writer for a pass, as [`ask`] does, and waits until it is done.
async fn settled(ctx: &Arc<Ctx>, id: &str, afresh: bool) -> Progress {
    let (group, number) = ask(ctx, id, afresh);
    let mut progress = group.progress.subscribe();
    let done = progress.wait_for(|progress| progress.done >= number).await;
    done.map(|progress| progress.clone()).unwrap_or_default()
}

/// Keeps a group as bindings want it, until it is nobody's business any more.
async fn keep(ctx: Arc<Ctx>, id: String, group: Arc<Group>) {
    loop {
        let writer = tokio::spawn(write_for_ever(Arc::clone(&ctx), id.clone(), Arc::clone(&group)));
        let Err(error) = writer.await else { return };
        error!(group = id, %error, "the writer of a security group broke off");
        tokio::time::sleep(backoff(u32::MAX, 0.0)).await;
    }
}

async fn write_for_ever(ctx: Arc<Ctx>, id: String, group: Arc<Group>) {
    let mut wake = group.asked.subscribe();
    let (mut known, mut quota_met) = (Known::default(), Instant::now());
    let (mut failures, mut read) = (0u32, 0);
    let mut next = Instant::now();
    loop {
        let asked = *wake.borrow_and_update();
        let afresh = next <= Instant::now() || asked.afresh != read;
        read = asked.afresh;
        // Quotas can be raised.
        if quota_met.elapsed() >= SEARCH {
            known.forget_quota();
            quota_met = Instant::now();
        }
        let state = write(&ctx, &id, &mut known, afresh).await;
        if let Some(error) = &state.error {
            warn!(group = id, %error, "could not bring a security group to what bindings want");
        }
        let again = if is_failed(&state) {
            failures = failures.saturating_add(1);
            backoff(failures, 0.0)
        } else {
            failures = 0;
            if state.leans_on_others { AGAIN.min(ctx.settings.resync) } else { ctx.settings.resync }
        };
        let at = Instant::now() + again.mul_f64(0.9 + fastrand::f64() * 0.2);
        next = if afresh { at } else { next.min(at) };
        let is_over = state.error.is_none() && state.ours.as_ref().is_some_and(BTreeSet::is_empty);
        let is_used = publish(&ctx, &id, &group, asked, state);
        if is_over && !is_used && end(&ctx, &id, &group, asked) {
            return;
        }
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            _ = wake.changed() => {}
            () = tokio::time::sleep_until(next) => {}
        }
    }
}

/// Tells how a pass has ended, and wakes the bindings that stand otherwise now. Whether any binding uses the group.
fn publish(ctx: &Ctx, id: &str, group: &Group, asked: Asked, state: State) -> bool {
    let state = Arc::new(state);
    let mut before = None;
    group.progress.send_modify(|progress| {
        progress.done = asked.times;
        if let Some(ours) = &state.ours {
            progress.ours.clone_from(ours);
        }
        before = progress.state.replace(Arc::clone(&state));
    });
    let (mut is_used, mut changed) = (false, Concerned::new());
    for (key, held) in lock(&ctx.security.claims).iter() {
        let uses = held.claim.rules.contains_key(id);
        is_used |= uses;
        let is_concerned = (uses || held.left.contains(id)) && before.as_ref() != Some(&state);
        if is_concerned
            && standing_in(&held.claim, id, before.as_deref()) != standing_in(&held.claim, id, Some(&state))
        {
            changed.insert(key.clone());
        }
    }
    ctx.nudge(&changed);
    is_used
}

/// Ends a group's writer, unless somebody has asked for another pass.
fn end(ctx: &Ctx, id: &str, group: &Group, asked: Asked) -> bool {
    let mut groups = lock(&ctx.security.groups);
    let ends = *group.asked.borrow() == asked;
    if ends {
        groups.remove(id);
    }
    ends
}

fn is_failed(state: &State) -> bool {
    state.error.is_some() || !state.failed.is_empty() || state.unretained.is_some()
}

/// Drives one pass.
async fn write(ctx: &Arc<Ctx>, id: &str, known: &mut Known, afresh: bool) -> State {
    let marker = marker(ctx);
    let mut elsewhere = Vec::new();
    let mut pass = if afresh { Pass::default() } else { Pass::remembering(known) };
    loop {
        let mut claims = claims_in(ctx, id);
        claims.extend(elsewhere.iter().cloned());
        let wish = Wish {
            group: id,
            claims: &claims,
            marker: &marker,
            adopt: ctx.settings.adopt_unmarked_rules,
            overflow: ctx.settings.rule_overflow,
        };
        let step = pass.next(&wish, known);
        let writes =
            matches!(step, Step::Authorize(_) | Step::Modify(..) | Step::Retain(_) | Step::Revoke(_));
        if step == Step::Done || (ctx.settings.observe && (writes || step == Step::Confirm)) {
            let mut state = pass.state(&wish, known);
            if ctx.settings.observe {
                state.withheld = Some(pass.outlook(&wish, known)).filter(|outlook| *outlook != (0, 0));
            }
            return state;
        }
        let done = |answer: Result<(), AwsError>| answer.map(|()| Answer::Done);
        let answer = match &step {
            Step::Read => ctx.aws.security_group_rules(id).await.map(Answer::Rules),
            Step::Confirm => match bindings_elsewhere(ctx).await {
                Ok(found) => {
                    elsewhere = found;
                    ctx.aws.security_group_rules(id).await.map(Answer::Rules)
                }
                Err(error) => Err(error),
            },
            Step::Authorize(rules) => done(ctx.aws.authorize(id, rules, &marker).await),
            Step::Modify(rule, to) => {
                let rule = Rule { id: rule.clone(), permission: to.clone(), description: marker.clone() };
                done(ctx.aws.modify_rules(id, &[rule]).await)
            }
            Step::Retain(rules) => {
                let rules: Vec<Rule> = rules.iter().cloned().map(Rule::from).collect();
                done(ctx.aws.modify_rules(id, &rules).await)
            }
            Step::Revoke(rules) => done(ctx.aws.revoke(id, rules).await),
            Step::Done => Ok(Answer::Done),
        };
        match &answer {
            Ok(_) if writes => info!(group = id, step = told(&step), "changed"),
            Err(error) if writes => info!(group = id, step = told(&step), %error, "refused"),
            _ => {}
        }
        pass.answered(&wish, known, &step, answer.unwrap_or_else(Answer::Failed));
    }
}

impl From<Retained> for Rule {
    fn from(Retained { id, permission, description }: Retained) -> Self {
        Self { id, permission, description }
    }
}

/// A step for the log.
fn told(step: &Step) -> String {
    match step {
        Step::Authorize(rules) => {
            let rules: Vec<String> = rules.iter().map(shown).collect();
            format!("authorize {}", rules.join(", "))
        }
        Step::Modify(rule, to) => format!("turn {rule} into {}", shown(to)),
        Step::Retain(rules) => {
            let rules: Vec<&str> = rules.iter().map(|rule| rule.id.as_str()).collect();
            format!("retain {}", rules.join(", "))
        }
        Step::Revoke(rules) => format!("revoke {}", rules.join(", ")),
        Step::Read | Step::Confirm | Step::Done => "read".to_owned(),
    }
}

/// The claims as far as they concern a group, that of the oldest binding first. A binding that was not looked at yet, or
/// that can't be read, keeps what its spec could ask for.
fn claims_in(ctx: &Ctx, id: &str) -> Vec<Claim> {
    let index = ctx.index();
    let claims = lock(&ctx.security.claims);
    let of = |key: &Key, spec| match claims.get(key) {
        Some(held) => held.claim.within(id),
        None => Some(Claim::keeping(anywhere(spec))).filter(|claim| !claim.keep.is_empty()),
    };
    let mut all: Vec<_> = index
        .bindings()
        .filter(|(_, binding)| binding.spec.networking.is_some())
        .filter_map(|(key, binding)| Some((binding.created, key, of(key, &binding.spec)?)))
        .collect();
    all.sort_by(|one, other| (one.0, one.1).cmp(&(other.0, other.1)));
    let unreadable = index.unreadable.values().map(|keep| Claim::keeping(keep.clone()));
    all.into_iter().map(|(_, _, claim)| claim).chain(unreadable).collect()
}

/// The code of the error that the bindings of other namespaces could not be listed, so that nothing may be taken away.
const UNLISTED: &str = "BindingsNotListed";

/// With `--watch-namespaces`, the bindings that are not watched count as wanting their rules, too.
async fn bindings_elsewhere(ctx: &Ctx) -> Result<Vec<Claim>, AwsError> {
    if !ctx.settings.watches_some {
        return Ok(Vec::new());
    }
    let api: Api<Listed> = Api::all(ctx.client.clone());
    let (mut found, mut page) = (Vec::new(), ListParams::default().limit(PAGE));
    loop {
        let list = api.list(&page).await.map_err(|error| AwsError {
            operation: "list targetgroupbindings",
            code: UNLISTED.to_owned(),
            message: format!(
                "nothing is taken away before the bindings of all namespaces are known: {}",
                tgb_process::told(&error)
            ),
        })?;
        {
            let index = ctx.index();
            let keeps =
                list.items.iter().filter(|listed| !index.has_binding(&listed.key())).map(Listed::keeps);
            found.extend(keeps.filter(|keep| !keep.is_empty()).map(Claim::keeping));
        }
        match list.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page = page.continue_token(&token),
            None => return Ok(found),
        }
    }
}

#[cfg(test)]
mod tests;
