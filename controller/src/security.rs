//! Security groups: finds the groups of targets, keeps every binding's claim, and drives one [`Pass`] per group at a
//! time. One writer per group; different groups side by side.

use crate::claims::Group;
use crate::context::Ctx;
use crate::desired::{Origin, TargetKey, Wanted};
use crate::group::{Answer, Known, Pass, State, Step, Wish, is_open};
use crate::index::{Concerned, Index, Key};
use crate::kept::Pod;
use crate::network::{self, Claim, anywhere, group_of, permissions};
use crate::reason::{Kind, Reason};
use crate::reconcile::backoff;
use crate::status::Report;
use futures::future::BoxFuture;
use kube::Api;
use kube::api::ListParams;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tgb_api::names;
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::values::{NetworkInterface, Permission, SecurityGroup};
use tgb_aws::{AwsError, Class};
use tokio::time::Instant;
use tracing::{info, warn};

/// Interfaces and tags change rarely; what is not found is looked up again sooner.
const REMEMBERED: Duration = Duration::from_secs(600);
/// How old an answer may be that did not hold what was looked for.
const LOOKED: Duration = Duration::from_secs(10);
/// How often a group is looked at that leans on somebody else's rule; one that failed or can't hold all, sooner at first.
const AGAIN: Duration = Duration::from_secs(60);
/// How often the VPC is searched for rules of ours that nobody wants.
const SEARCH: Duration = Duration::from_secs(3600);

/// How a binding's rules stand.
enum Standing {
    Authorized(String),
    Pending(String),
    Failed(Reason, String),
}

/// What is known of a binding's targets when its rules are looked at.
pub(crate) enum Sight<'a> {
    /// These; `lingers` if others of it are still registered or draining.
    Targets { wanted: &'a BTreeMap<TargetKey, Wanted>, vpc: Option<&'a str>, lingers: bool },
    /// None for now, or it is sick for good: it keeps the rules that it had.
    Nothing,
    /// Not known for want of data.
    Unknown,
    /// Nobody wants anything written for it.
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
        put_claim(ctx, key, Claim::Groups(BTreeMap::new()));
        return true;
    }
    let old = lock(&ctx.security.claims).get(key).cloned();
    let had = old.as_ref().and_then(Claim::groups).filter(|groups| !groups.is_empty());
    let keeps = || had.map_or_else(|| Claim::Anywhere(anywhere(binding)), |had| Claim::Groups(had.clone()));
    let mut is_done = true;
    let new = match sight {
        Sight::Targets { wanted, vpc, lingers } => match claim(ctx, binding, wanted, vpc).await {
            Ok((claim, problem)) => {
                let keeps_all = lingers || problem.is_some();
                if let Some((reason, message)) = problem {
                    report.bad(Kind::NetworkingReady, reason, message);
                }
                if keeps_all { claim.keeping(anywhere(binding)) } else { claim }
            }
            Err(error) => {
                report.bad(Kind::NetworkingReady, reason_of(&error), error.to_string());
                is_done = false;
                if had.is_some() { keeps().keeping(anywhere(binding)) } else { Claim::Unknown }
            }
        },
        Sight::Nothing => keeps(),
        Sight::Unknown => old.clone().unwrap_or(Claim::Unknown),
        Sight::Paused => {
            let mut kept = anywhere(binding);
            let before = old.iter().flat_map(|old| old.groups().into_iter().flat_map(BTreeMap::values));
            kept.extend(before.flatten().cloned());
            kept.extend(old.iter().filter_map(Claim::anywhere).flatten().cloned());
            Claim::Anywhere(kept)
        }
    };
    let groups = groups_in(&new);
    put_claim(ctx, key, new);
    let standing = standing(ctx, key);
    if changed && matches!(standing, Standing::Failed(..)) {
        for group in groups {
            let ctx = Arc::clone(ctx);
            tokio::spawn(async move { settle(&ctx, &group).await });
        }
    }
    match standing {
        Standing::Authorized(message) => report.ok(Kind::NetworkingReady, Reason::Authorized, message),
        Standing::Failed(reason, message) => report.bad(Kind::NetworkingReady, reason, message),
        Standing::Pending(message) => report.unknown(Kind::NetworkingReady, Reason::Pending, message),
    }
    is_done
}

/// Puts down what a binding wants and sets the writers of the groups concerned to work.
pub(crate) fn put_claim(ctx: &Arc<Ctx>, key: &Key, claim: Claim) {
    let security = &ctx.security;
    let concerned: BTreeSet<String> = {
        let mut claims = lock(&security.claims);
        let old = claims.get(key);
        if old == Some(&claim) {
            return;
        }
        // What could not be revoked for want of this claim may go now.
        let kept_all = !matches!(old, Some(Claim::Groups(_)));
        let mut concerned = groups_in(&claim);
        concerned.extend(old.map(groups_in).unwrap_or_default());
        claims.insert(key.clone(), claim);
        if kept_all {
            concerned.extend(lock(&security.groups).keys().cloned());
        }
        concerned
    };
    for group in concerned {
        let ctx = Arc::clone(ctx);
        tokio::spawn(async move { settle(&ctx, &group).await });
    }
}

/// Takes a binding's claim away and waits until the rules that only it wanted are gone.
pub(crate) async fn drop_claim(ctx: &Arc<Ctx>, key: &Key) -> Result<(), AwsError> {
    // Before the search has ended, not all groups with rules of ours are known.
    let searched = ctx.security.searched.initialized();
    if !searched {
        let poll = async {
            while !ctx.security.searched.initialized() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        // If it takes long, it will find the rules itself.
        let _ = tokio::time::timeout(Duration::from_secs(10), poll).await;
    }
    let concerned: BTreeSet<String> = {
        let mut claims = lock(&ctx.security.claims);
        let old = claims.insert(key.clone(), Claim::Groups(BTreeMap::new()));
        let all = lock(&ctx.security.groups);
        match old {
            Some(Claim::Groups(groups)) if !groups.is_empty() => groups.into_keys().collect(),
            _ => all.keys().cloned().collect(),
        }
    };
    for group in concerned {
        if let Some(error) = settle(ctx, &group).await.error {
            return Err(error);
        }
    }
    Ok(())
}

/// Forgets a binding that is gone; its rules go, too.
pub(crate) fn forget(ctx: &Arc<Ctx>, key: &Key) {
    let Some(old) = lock(&ctx.security.claims).remove(key) else { return };
    for group in groups_in(&old) {
        let ctx = Arc::clone(ctx);
        tokio::spawn(async move { settle(&ctx, &group).await });
    }
}

/// Looks at every group again that could not be done, as when AWS answers again.
pub(crate) fn retry(ctx: &Arc<Ctx>) {
    let failed: Vec<String> = lock(&ctx.security.groups)
        .iter()
        .filter(|(_, group)| {
            lock(&group.state).as_ref().is_none_or(|state| state.error.is_some() || !state.failed.is_empty())
        })
        .map(|(id, _)| id.clone())
        .collect();
    for id in failed {
        let ctx = Arc::clone(ctx);
        tokio::spawn(async move { settle(&ctx, &id).await });
    }
}

/// At start and every hour: groups of the VPC that have rules of ours are looked at, whether or not a binding still
/// names them.
pub(crate) async fn search(ctx: Arc<Ctx>) {
    loop {
        let mut again = SEARCH;
        match find(&ctx).await {
            Ok(found) => {
                let mut groups = lock(&ctx.security.groups);
                for id in found {
                    groups.entry(id).or_default();
                }
            }
            Err(error) => {
                warn!(%error, "could not look for security groups with rules of ours");
                again = Duration::from_secs(300);
            }
        }
        // Whoever asks first finds it set.
        let _ = ctx.security.searched.set(());
        let all: Vec<(String, Arc<Group>)> =
            lock(&ctx.security.groups).iter().map(|(id, group)| (id.clone(), Arc::clone(group))).collect();
        for (id, group) in all {
            group.known.lock().await.forget_quota();
            settle(&ctx, &id).await;
        }
        tokio::select! {
            () = ctx.stop.cancelled() => return,
            () = tokio::time::sleep(again) => {}
        }
    }
}

/// The ids of the VPC's groups that have rules of ours.
async fn find(ctx: &Ctx) -> Result<Vec<String>, AwsError> {
    let Some(vpc) = vpc(ctx).await? else { return Ok(Vec::new()) };
    let marker = marker(ctx);
    let adopt = ctx.settings.adopt_unmarked_rules;
    let is_ours = |text: &str| text == marker || (adopt && text == names::RULE_DESCRIPTION);
    ctx.aws.security_group_ids_with_rules(&vpc, is_ours).await
}

/// The cluster's VPC: as given, as the instance metadata service says, or that of a node.
async fn vpc(ctx: &Ctx) -> Result<Option<String>, AwsError> {
    if let Some(vpc) = ctx.aws.find_vpc_id().await {
        return Ok(Some(vpc.to_owned()));
    }
    let instances: BTreeSet<String> = {
        let index = ctx.index();
        index.nodes.values().filter_map(|node| node.instance_id()).take(20).map(str::to_owned).collect()
    };
    let found = interfaces(ctx, &instances, REMEMBERED, Sought::Instances).await?;
    Ok(found.into_iter().find_map(|interface| interface.vpc_id))
}

/// Finds the groups of a binding's targets. The second part says what could not be found.
async fn claim(
    ctx: &Ctx,
    binding: &TargetGroupBinding,
    targets: &BTreeMap<TargetKey, Wanted>,
    vpc: Option<&str>,
) -> Result<(Claim, Option<(Reason, String)>), AwsError> {
    let sites: Vec<Site> = {
        let index = ctx.index();
        targets.iter().filter_map(|(key, wanted)| site(&index, key, wanted)).collect()
    };
    let mut at: BTreeMap<String, (NetworkInterface, Vec<&Pod>)> = BTreeMap::new();
    let mut problem = None;
    let mut left: Vec<&Site> = sites.iter().collect();
    // What is not in a remembered answer is asked for once more.
    for younger in [REMEMBERED, LOOKED] {
        let mut known = Vec::new();
        for sought in [Sought::Enis, Sought::Instances, Sought::Addresses(vpc)] {
            let keys = left.iter().filter_map(|site| site.key(sought)).collect();
            known.extend(interfaces(ctx, &keys, younger, sought).await?);
        }
        left.retain(|site| {
            let found = known.iter().find(|interface| site.is_at(interface));
            if let Some(interface) = found {
                let entry = at.entry(interface.id.clone()).or_insert_with(|| (interface.clone(), Vec::new()));
                entry.1.extend(site.pod.as_ref());
            }
            found.is_none()
        });
        if left.is_empty() {
            break;
        }
    }
    if let Some(lost) = left.first() {
        let others = if left.len() > 1 { format!(" and {} others", left.len() - 1) } else { String::new() };
        let message = format!("no network interface of {}{others} is found", lost.describe());
        problem = Some((Reason::SecurityGroupNotFound, message));
    }
    let several: BTreeSet<String> = at
        .values()
        .filter(|(interface, _)| interface.security_groups.len() > 1)
        .flat_map(|(interface, _)| interface.security_groups.iter().cloned())
        .collect();
    let chosen = |tags: &BTreeMap<String, SecurityGroup>| -> Vec<Result<String, (Reason, String)>> {
        let sought = &ctx.settings.security_group_tags;
        at.values().map(|(interface, _)| group_of(interface, tags, sought)).collect()
    };
    let mut found = chosen(&tags(ctx, &several, REMEMBERED).await?);
    if found.iter().any(Result::is_err) {
        found = chosen(&tags(ctx, &several, LOOKED).await?);
    }
    let mut groups: BTreeMap<String, BTreeSet<Permission>> = BTreeMap::new();
    for ((_, pods), group) in at.values().zip(found) {
        match group {
            Ok(group) => groups.entry(group).or_default().extend(permissions(binding, pods)),
            Err(why) => problem = problem.or(Some(why)),
        }
    }
    Ok((Claim::Groups(groups), problem))
}

// ---- details ----

fn marker(ctx: &Ctx) -> String {
    network::marker(&ctx.settings.cluster_name, ctx.settings.rule_owner.as_deref())
}

fn groups_in(claim: &Claim) -> BTreeSet<String> {
    claim.groups().into_iter().flat_map(BTreeMap::keys).cloned().collect()
}

/// Whether what a binding wants is there.
fn standing(ctx: &Ctx, key: &Key) -> Standing {
    let claim = lock(&ctx.security.claims).get(key).cloned().unwrap_or(Claim::Unknown);
    let Some(claimed) = claim.groups() else {
        return match claim {
            Claim::Anywhere(_) => Standing::Authorized("the rules that there are stay".to_owned()),
            _ => Standing::Pending("the security groups are not known yet".to_owned()),
        };
    };
    let mut pending = None;
    let mut widened = BTreeSet::new();
    for (id, permissions) in claimed {
        let group = lock(&ctx.security.groups).get(id).cloned();
        let Some(state) = group.and_then(|group| lock(&group.state).clone()) else {
            pending = Some("the security groups are not done yet".to_owned());
            continue;
        };
        let uses = |wide: &&Permission| permissions.iter().any(|asked| is_open(asked, [*wide]));
        widened.extend(state.widened.iter().filter(uses).map(|wide| format!("{id} {}", shown(wide))));
        for permission in permissions.iter().filter(|asked| !is_open(asked, &state.rules)) {
            let failure = state.failed.iter().find(|(failed, _)| is_open(permission, [*failed]));
            match failure.map(|(_, error)| error).or(state.error.as_ref()) {
                Some(error) => {
                    let message = format!("{id}, {}: {error}", shown(permission));
                    return Standing::Failed(reason_of(error), message);
                }
                None => {
                    pending = Some(match state.withheld {
                        Some((add, revoke)) => {
                            format!("would add {add} rules to {id} and take away {revoke}")
                        }
                        None => "the security groups are not done yet".to_owned(),
                    });
                }
            }
        }
    }
    if let Some(pending) = pending {
        return Standing::Pending(pending);
    }
    let mut message = match claimed.len() {
        1 => "1 security group has the rules".to_owned(),
        groups => format!("{groups} security groups have the rules"),
    };
    if !widened.is_empty() {
        let widened: Vec<String> = widened.into_iter().collect();
        message.push_str("; widened for want of room: ");
        message.push_str(&widened.join(", "));
    }
    Standing::Authorized(message)
}

/// What `NetworkingReady` says of an error.
fn reason_of(error: &AwsError) -> Reason {
    match error.code.as_str() {
        "RulesPerSecurityGroupLimitExceeded" => Reason::RuleLimitExceeded,
        "InvalidGroup.NotFound" | "InvalidGroupId.Malformed" => Reason::SecurityGroupNotFound,
        _ if error.class() == Class::Terminal => Reason::AccessDenied,
        _ => Reason::AwsUnavailable,
    }
}

/// `tcp 80-90 from sg-1`
fn shown(permission: &Permission) -> String {
    let Permission { protocol, from_port, to_port, source } = permission;
    let source = match source {
        tgb_aws::values::Source::SecurityGroup(id) => id,
        tgb_aws::values::Source::Cidr(cidr) => cidr,
    };
    let ports = if from_port == to_port { from_port.to_string() } else { format!("{from_port}-{to_port}") };
    format!("{} {ports} from {source}", protocol.as_str())
}

/// Where a target is.
struct Site {
    target: TargetKey,
    ip: Option<IpAddr>,
    pod: Option<Pod>,
    eni: Option<String>,
    instance: Option<String>,
}

/// By what an interface is looked for.
#[derive(Clone, Copy)]
enum Sought<'a> {
    Enis,
    Instances,
    /// In a VPC; nothing is found without one.
    Addresses(Option<&'a str>),
}

impl Site {
    /// What to ask AWS for, if that is the way to find it.
    fn key(&self, sought: Sought<'_>) -> Option<String> {
        match (sought, &self.eni, &self.instance) {
            (Sought::Enis, Some(eni), _) => Some(eni.clone()),
            (Sought::Instances, None, Some(instance)) => Some(instance.clone()),
            (Sought::Addresses(Some(_)), None, None) => self.ip.map(|ip| ip.to_string()),
            _ => None,
        }
    }

    fn is_at(&self, interface: &NetworkInterface) -> bool {
        match (&self.eni, &self.instance, &self.ip) {
            (Some(eni), _, _) => interface.id == *eni,
            (None, Some(instance), ip) => {
                interface.instance_id.as_ref() == Some(instance)
                    && match ip {
                        Some(ip) => holds(interface, ip),
                        None => interface.device_index == Some(0),
                    }
            }
            (None, None, Some(ip)) => holds(interface, ip),
            (None, None, None) => false,
        }
    }

    fn describe(&self) -> String {
        match (&self.eni, &self.instance) {
            (Some(eni), _) => format!("{} ({eni})", self.target),
            (None, Some(instance)) => format!("{} (instance {instance})", self.target),
            (None, None) => self.target.to_string(),
        }
    }
}

fn holds(interface: &NetworkInterface, ip: &IpAddr) -> bool {
    interface.addresses.contains(ip)
        || interface
            .prefixes
            .iter()
            .filter_map(|prefix| prefix.parse::<ipnet::IpNet>().ok())
            .any(|prefix| prefix.contains(ip))
}

/// Hybrid nodes have no interface at EC2.
fn site(index: &Index, target: &TargetKey, wanted: &Wanted) -> Option<Site> {
    let (pod, node) = match &wanted.origin {
        Origin::Pod { key, .. } => {
            let pod = index.pod(key).map(|(_, pod)| pod);
            (pod.cloned(), pod.and_then(|pod| index.nodes.get(pod.node.as_deref()?)))
        }
        Origin::Node(name) => (None, index.nodes.get(name.as_str())),
        Origin::Bare => (None, None),
    };
    let compute = node.and_then(|node| node.labels.get("eks.amazonaws.com/compute-type"));
    if compute.is_some_and(|compute| compute == "hybrid") {
        return None;
    }
    let ip: Option<IpAddr> = target.id.parse().ok();
    let eni = pod.as_ref().and_then(|pod| pod.eni()).and_then(|text| eni_in(text, ip));
    let instance = node.and_then(|node| node.instance_id()).map(str::to_owned);
    Some(Site { target: target.clone(), ip, pod, eni, instance })
}

/// The interface that the annotation `vpc.amazonaws.com/pod-eni` names for an address.
fn eni_in(annotation: &str, ip: Option<IpAddr>) -> Option<String> {
    let all: Vec<serde_json::Value> = serde_json::from_str(annotation).ok()?;
    let has = |entry: &&serde_json::Value| {
        let addresses = ["privateIp", "ipv6Addr"].map(|field| entry.get(field)?.as_str()?.parse().ok());
        ip.is_some() && addresses.contains(&ip)
    };
    all.iter().find(has).or(all.first())?.get("eniId")?.as_str().map(str::to_owned)
}

/// Interfaces as remembered for at most `younger`, or as AWS has them now.
async fn interfaces(
    ctx: &Ctx,
    keys: &BTreeSet<String>,
    younger: Duration,
    sought: Sought<'_>,
) -> Result<Vec<NetworkInterface>, AwsError> {
    let mut found = Vec::new();
    let mut unknown = Vec::new();
    {
        let remembered = lock(&ctx.security.interfaces);
        for key in keys {
            match remembered.get(key).filter(|(read, _)| read.elapsed() < younger) {
                Some((_, interfaces)) => found.extend(interfaces.iter().cloned()),
                None => unknown.push(key.clone()),
            }
        }
    }
    if unknown.is_empty() {
        return Ok(found);
    }
    let read = match sought {
        Sought::Enis => ctx.aws.interfaces(&unknown).await?,
        Sought::Instances => ctx.aws.interfaces_of_instances(&unknown).await?,
        Sought::Addresses(vpc) => {
            let addresses: Vec<IpAddr> = unknown.iter().filter_map(|key| key.parse().ok()).collect();
            ctx.aws.interfaces_by_address(vpc.unwrap_or_default(), &addresses).await?
        }
    };
    let now = Instant::now();
    let mut remembered = lock(&ctx.security.interfaces);
    remembered.retain(|_, (read, _)| read.elapsed() < REMEMBERED);
    for key in unknown {
        let is_of = |interface: &&NetworkInterface| match sought {
            Sought::Enis => interface.id == key,
            Sought::Instances => interface.instance_id.as_ref() == Some(&key),
            Sought::Addresses(_) => key.parse().is_ok_and(|ip| holds(interface, &ip)),
        };
        let own: Vec<NetworkInterface> = read.iter().filter(is_of).cloned().collect();
        found.extend(own.iter().cloned());
        remembered.insert(key, (now, own));
    }
    Ok(found)
}

async fn tags(
    ctx: &Ctx,
    ids: &BTreeSet<String>,
    younger: Duration,
) -> Result<BTreeMap<String, SecurityGroup>, AwsError> {
    let mut found = BTreeMap::new();
    let mut unknown = Vec::new();
    {
        let remembered = lock(&ctx.security.tags);
        for id in ids {
            match remembered.get(id).filter(|(read, _)| read.elapsed() < younger) {
                Some((_, group)) => drop(found.insert(id.clone(), group.clone())),
                None => unknown.push(id.clone()),
            }
        }
    }
    if !unknown.is_empty() {
        let now = Instant::now();
        for group in ctx.aws.security_groups(&unknown).await? {
            lock(&ctx.security.tags).insert(group.id.clone(), (now, group.clone()));
            found.insert(group.id.clone(), group);
        }
    }
    Ok(found)
}

/// Brings a group to what is wanted now. Passes that were asked for while another ran are one.
async fn settle(ctx: &Arc<Ctx>, id: &str) -> State {
    let group = Arc::clone(lock(&ctx.security.groups).entry(id.to_owned()).or_default());
    let ticket = group.asked.fetch_add(1, Ordering::AcqRel) + 1;
    let mut known = group.known.lock().await;
    if group.done.load(Ordering::Acquire) >= ticket {
        return lock(&group.state).clone().unwrap_or_default();
    }
    let up_to = group.asked.load(Ordering::Acquire);
    let state = write(ctx, id, &mut known).await;
    group.done.store(up_to, Ordering::Release);
    let changed = lock(&group.state).replace(state.clone()).as_ref() != Some(&state);
    let users: Concerned = lock(&ctx.security.claims)
        .iter()
        .filter(|(_, claim)| claim.groups().is_some_and(|groups| groups.contains_key(id)))
        .map(|(key, _)| key.clone())
        .collect();
    if changed {
        ctx.nudge(&users);
    }
    if let Some(error) = &state.error {
        warn!(group = id, %error, "could not bring a security group to what bindings want");
    }
    let again = if state.error.is_some() || !state.failed.is_empty() {
        backoff(group.failures.fetch_add(1, Ordering::AcqRel).saturating_add(1), 0.0)
    } else {
        group.failures.store(0, Ordering::Release);
        if state.leans_on_others { AGAIN.min(ctx.settings.resync) } else { ctx.settings.resync }
    };
    if state.error.is_none() && users.is_empty() && state.ours == 0 {
        // Nobody's business any more.
        lock(&ctx.security.groups).retain(|known, entry| known != id || !Arc::ptr_eq(entry, &group));
    } else {
        let again = again.mul_f64(0.9 + fastrand::f64() * 0.2);
        let later = tokio::spawn(settle_later(Arc::clone(ctx), id.to_owned(), again)).abort_handle();
        // The one before may be this very task: it has nothing else to do.
        if let Some(before) = lock(&group.later).replace(later) {
            before.abort();
        }
    }
    state
}

fn settle_later(ctx: Arc<Ctx>, id: String, again: Duration) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        tokio::select! {
            () = ctx.stop.cancelled() => {}
            () = tokio::time::sleep(again) => drop(settle(&ctx, &id).await),
        }
    })
}

/// Drives one pass.
async fn write(ctx: &Arc<Ctx>, id: &str, known: &mut Known) -> State {
    let marker = marker(ctx);
    let mut elsewhere = Vec::new();
    let mut pass = Pass::default();
    loop {
        let mut claims = all_claims(ctx);
        claims.extend(elsewhere.iter().cloned());
        let wish = Wish {
            group: id,
            claims: &claims,
            marker: &marker,
            adopt: ctx.settings.adopt_unmarked_rules,
            overflow: ctx.settings.rule_overflow,
        };
        let step = pass.next(&wish, known);
        let writes = matches!(step, Step::Authorize(_) | Step::Modify(..) | Step::Revoke(_));
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
            Step::Confirm => {
                elsewhere = bindings_elsewhere(ctx).await.unwrap_or_else(|error| {
                    warn!(group = id, %error, "could not read the bindings of other namespaces; nothing is revoked");
                    vec![Claim::Unknown]
                });
                ctx.aws.security_group_rules(id).await.map(Answer::Rules)
            }
            Step::Authorize(rules) => done(ctx.aws.authorize(id, rules, &marker).await),
            Step::Modify(rule, to) => done(ctx.aws.modify_rule(id, rule, to, &marker).await),
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

/// A step for the log.
fn told(step: &Step) -> String {
    match step {
        Step::Authorize(rules) => {
            let rules: Vec<String> = rules.iter().map(shown).collect();
            format!("authorize {}", rules.join(", "))
        }
        Step::Modify(rule, to) => format!("turn {rule} into {}", shown(to)),
        Step::Revoke(rules) => format!("revoke {}", rules.join(", ")),
        Step::Read | Step::Confirm | Step::Done => "read".to_owned(),
    }
}

/// The claims of all bindings, the oldest first; those that have networking and were not looked at yet are unknown.
fn all_claims(ctx: &Ctx) -> Vec<Claim> {
    let index = ctx.index();
    let claims = lock(&ctx.security.claims);
    let mut all: Vec<_> = index
        .bindings()
        .filter(|(_, binding)| binding.spec.networking.is_some())
        .map(|(key, binding)| (binding.created, key, claims.get(key).cloned().unwrap_or(Claim::Unknown)))
        .collect();
    all.sort_by(|one, other| (one.0, one.1).cmp(&(other.0, other.1)));
    let unreadable = index.unreadable.iter().filter(|key| !index.has_binding(key));
    all.into_iter().map(|(_, _, claim)| claim).chain(unreadable.map(|_| Claim::Unknown)).collect()
}

/// With `--watch-namespaces`, the bindings that are not watched count as wanting their rules, too.
async fn bindings_elsewhere(ctx: &Ctx) -> Result<Vec<Claim>, kube::Error> {
    if !ctx.settings.watches_some {
        return Ok(Vec::new());
    }
    let api: Api<TargetGroupBinding> = Api::all(ctx.client.clone());
    let all = api.list(&ListParams::default()).await?;
    let index = ctx.index();
    let elsewhere = all.items.iter().filter(|binding| {
        binding.spec.networking.is_some() && !index.has_binding(&Key::of(&binding.metadata))
    });
    Ok(elsewhere.map(|binding| Claim::Anywhere(anywhere(binding))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotation_of_a_pod_names_the_interface_of_its_address() {
        let text = r#"[{"eniId":"eni-1","privateIp":"10.0.0.1"},{"eniId":"eni-2","privateIp":"10.0.0.2","ipv6Addr":"fd00::2"}]"#;
        assert_eq!(eni_in(text, "10.0.0.2".parse().ok()).as_deref(), Some("eni-2"));
        assert_eq!(eni_in(text, "fd00::2".parse().ok()).as_deref(), Some("eni-2"));
        assert_eq!(eni_in(text, "10.0.0.9".parse().ok()).as_deref(), Some("eni-1"));
        assert_eq!(eni_in("nonsense", None), None);
    }

    #[test]
    fn an_interface_holds_its_addresses_and_its_prefixes() {
        let interface = NetworkInterface {
            addresses: vec!["192.168.0.10".parse().unwrap()],
            prefixes: vec!["10.244.0.16/28".to_owned(), "fd00::/80".to_owned()],
            ..Default::default()
        };
        for (ip, held) in [
            ("192.168.0.10", true),
            ("10.244.0.31", true),
            ("10.244.0.32", false),
            ("fd00::7", true),
            ("fd01::7", false),
        ] {
            assert_eq!(holds(&interface, &ip.parse().unwrap()), held, "{ip}");
        }
    }
}
