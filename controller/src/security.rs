//! Security groups: finds the groups of targets, keeps every binding's claim, and brings one group at a time to what
//! all claims together want. One writer per group; different groups side by side.

use crate::claims::{Group, State};
use crate::context::Ctx;
use crate::desired::{Origin, TargetKey, Wanted};
use crate::index::{Concerned, Key, Pod};
use crate::network::{self, Claim, anywhere, covers, group_of, group_plan, permissions};
use crate::reason::Reason;
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
use tgb_aws::AwsError;
use tgb_aws::values::{NetworkInterface, Permission, SecurityGroup};
use tokio::time::Instant;
use tracing::{info, warn};

/// Interfaces and tags change rarely; an address that is not found is looked up again at once.
const REMEMBERED: Duration = Duration::from_secs(600);
/// A group that could not be brought to what is wanted is tried again.
const AGAIN: Duration = Duration::from_secs(30);

/// How a binding's rules stand.
pub(crate) enum Standing {
    Authorized(usize),
    Pending,
    Failed(Reason, String),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
        let was_settled = matches!(old, Some(Claim::Groups(_)));
        let mut concerned: BTreeSet<String> = groups_in(&claim).into_iter().cloned().collect();
        concerned.extend(old.into_iter().flat_map(groups_in).cloned());
        claims.insert(key.clone(), claim);
        // What could not be revoked for want of this claim may go now.
        if !was_settled {
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
    let concerned: Vec<String> = {
        lock(&ctx.security.claims).insert(key.clone(), Claim::Groups(BTreeMap::new()));
        lock(&ctx.security.groups).keys().cloned().collect()
    };
    for group in concerned {
        if let Some(error) = settle(ctx, &group).await.error {
            return Err(error);
        }
    }
    Ok(())
}

/// Forgets a binding that is gone.
pub(crate) fn forget(ctx: &Ctx, key: &Key) {
    lock(&ctx.security.claims).remove(key);
}

/// The claim that stands for a binding, if any.
pub(crate) fn claim_of(ctx: &Ctx, key: &Key) -> Option<Claim> {
    lock(&ctx.security.claims).get(key).cloned()
}

/// Whether what a binding wants is there.
pub(crate) fn standing(ctx: &Ctx, key: &Key) -> Standing {
    let Some(Claim::Groups(claimed)) = claim_of(ctx, key) else { return Standing::Pending };
    let mut pending = false;
    for (id, permissions) in &claimed {
        let group = lock(&ctx.security.groups).get(id).cloned();
        let state = group.and_then(|group| lock(&group.state).clone());
        let Some(state) = state else {
            pending = true;
            continue;
        };
        for permission in permissions {
            if covers(&state.rules, permission) {
                continue;
            }
            let failure = state.failed.iter().find(|(failed, _)| covers([*failed], permission));
            match failure.map(|(_, error)| error).or(state.error.as_ref()) {
                Some(error) => {
                    let reason = match error.code.as_str() {
                        "RulesPerSecurityGroupLimitExceeded" => Reason::RuleLimitExceeded,
                        "InvalidGroup.NotFound" | "InvalidGroupId.Malformed" => Reason::SecurityGroupNotFound,
                        _ => Reason::AccessDenied,
                    };
                    return Standing::Failed(reason, format!("{id}: {error}"));
                }
                None => pending = true,
            }
        }
    }
    if pending { Standing::Pending } else { Standing::Authorized(claimed.len()) }
}

/// At start and every hour: groups of the VPC that have rules of ours are looked at, whether or not a binding still
/// names them.
pub(crate) async fn search(ctx: Arc<Ctx>) {
    loop {
        let mut again = Duration::from_secs(3600);
        if let Some(vpc) = ctx.aws.vpc_id() {
            match ctx.aws.security_group_ids_with_rule_description(vpc, names::RULE_DESCRIPTION).await {
                Ok(found) => {
                    let mut all: BTreeSet<String> = found.into_iter().collect();
                    all.extend(lock(&ctx.security.groups).keys().cloned());
                    for group in all {
                        settle(&ctx, &group).await;
                    }
                }
                Err(error) => {
                    warn!(%error, "could not look for security groups with rules of ours");
                    again = Duration::from_secs(300);
                }
            }
        }
        tokio::time::sleep(again).await;
    }
}

/// Finds the groups of a binding's targets. The second part says what could not be found.
pub(crate) async fn claim(
    ctx: &Ctx,
    binding: &TargetGroupBinding,
    targets: &BTreeMap<TargetKey, Wanted>,
    vpc: Option<&str>,
) -> Result<(Claim, Option<(Reason, String)>), AwsError> {
    let sites: Vec<Site> = {
        let index = ctx.index();
        targets.values().filter_map(|wanted| site(&index, wanted)).collect()
    };
    let enis: BTreeSet<String> = sites.iter().filter_map(|site| site.eni.clone()).collect();
    let named = match enis.is_empty() {
        true => Vec::new(),
        false => ctx.aws.interfaces(&enis.into_iter().collect::<Vec<_>>()).await?,
    };
    let instances: BTreeSet<String> =
        sites.iter().filter(|site| site.eni.is_none()).filter_map(|site| site.instance.clone()).collect();
    let mut known = interfaces(ctx, &instances, Duration::ZERO).await?;
    let lost: BTreeSet<String> = sites
        .iter()
        .filter(|site| site.eni.is_none() && site.interface(&known).is_none())
        .filter_map(|site| site.instance.clone())
        .collect();
    if !lost.is_empty() {
        known.extend(interfaces(ctx, &lost, Duration::from_secs(2)).await?);
    }
    let adrift: Vec<IpAddr> = sites
        .iter()
        .filter(|site| site.eni.is_none() && site.instance.is_none())
        .filter_map(|s| s.ip)
        .collect();
    let by_address = match (vpc, adrift.is_empty()) {
        (Some(vpc), false) => ctx.aws.interfaces_by_address(vpc, &adrift).await?,
        _ => Vec::new(),
    };

    let mut at: BTreeMap<String, (NetworkInterface, Vec<&Pod>)> = BTreeMap::new();
    let mut problem = None;
    for site in &sites {
        let found = match &site.eni {
            Some(eni) => named.iter().find(|interface| interface.id == *eni),
            None => site.interface(&known).or_else(|| {
                by_address.iter().find(|interface| site.ip.is_some_and(|ip| holds(interface, &ip)))
            }),
        };
        match found {
            Some(interface) => {
                let entry = at.entry(interface.id.clone()).or_insert_with(|| (interface.clone(), Vec::new()));
                entry.1.extend(site.pod.as_ref());
            }
            None => {
                let message = format!("no network interface of {} is found", site.name);
                problem.get_or_insert((Reason::SecurityGroupNotFound, message));
            }
        }
    }
    let several: BTreeSet<String> = at
        .values()
        .filter(|(interface, _)| interface.security_groups.len() > 1)
        .flat_map(|(interface, _)| interface.security_groups.iter().cloned())
        .collect();
    let tags = tags(ctx, &several).await?;
    let mut groups: BTreeMap<String, BTreeSet<Permission>> = BTreeMap::new();
    for (interface, pods) in at.values() {
        match group_of(interface, &tags, &ctx.settings.security_group_tags) {
            Ok(group) => groups.entry(group).or_default().extend(permissions(binding, pods)),
            Err(found) => {
                problem.get_or_insert(found);
            }
        }
    }
    for wanted in groups.values_mut() {
        *wanted = network::union(&*wanted);
    }
    Ok((Claim::Groups(groups), problem))
}

// ---- details ----

fn groups_in(claim: &Claim) -> Vec<&String> {
    match claim {
        Claim::Groups(groups) => groups.keys().collect(),
        Claim::Unknown | Claim::Anywhere(_) => Vec::new(),
    }
}

/// Where a target is.
struct Site {
    name: String,
    ip: Option<IpAddr>,
    pod: Option<Pod>,
    eni: Option<String>,
    instance: Option<String>,
}

impl Site {
    fn interface<'a>(&self, known: &'a [NetworkInterface]) -> Option<&'a NetworkInterface> {
        let instance = self.instance.as_deref()?;
        let mut of_instance =
            known.iter().filter(|interface| interface.instance_id.as_deref() == Some(instance));
        match &self.ip {
            Some(ip) => of_instance.find(|interface| holds(interface, ip)),
            None => of_instance.find(|interface| interface.device_index == Some(0)),
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
fn site(index: &crate::index::Index, wanted: &Wanted) -> Option<Site> {
    let key = TargetKey::of(&wanted.target);
    let (pod, node) = match &wanted.origin {
        Origin::Pod { key, .. } => {
            let pod = index.pods.get(key);
            (pod.cloned(), pod.and_then(|pod| index.nodes.get(pod.node.as_deref()?)))
        }
        Origin::Node(name) => (None, index.nodes.get(name.as_str())),
        Origin::Bare => (None, None),
    };
    let compute = node.and_then(|node| node.labels.get("eks.amazonaws.com/compute-type"));
    if compute.is_some_and(|compute| compute == "hybrid") {
        return None;
    }
    let eni = pod.as_ref().and_then(|pod| pod.eni.as_deref()).and_then(|text| {
        let all: serde_json::Value = serde_json::from_str(text).ok()?;
        all.get(0)?.get("eniId")?.as_str().map(str::to_owned)
    });
    Some(Site {
        name: key.to_string(),
        ip: key.id.parse().ok(),
        pod,
        eni,
        instance: node.and_then(|node| node.instance_id()).map(str::to_owned),
    })
}

/// The interfaces of instances; `younger` asks for answers that are not older (zero: what is remembered will do).
async fn interfaces(
    ctx: &Ctx,
    instances: &BTreeSet<String>,
    younger: Duration,
) -> Result<Vec<NetworkInterface>, AwsError> {
    let most = if younger.is_zero() { REMEMBERED } else { younger };
    let mut found = Vec::new();
    let mut unknown = Vec::new();
    {
        let remembered = lock(&ctx.security.interfaces);
        for id in instances {
            match remembered.get(id).filter(|(read, _)| read.elapsed() < most) {
                Some((_, interfaces)) => found.extend(interfaces.iter().cloned()),
                None => unknown.push(id.clone()),
            }
        }
    }
    if unknown.is_empty() {
        return Ok(found);
    }
    let read = ctx.aws.interfaces_of_instances(&unknown).await?;
    let now = Instant::now();
    let mut remembered = lock(&ctx.security.interfaces);
    remembered.retain(|_, (read, _)| read.elapsed() < REMEMBERED);
    for id in unknown {
        let own: Vec<_> =
            read.iter().filter(|interface| interface.instance_id.as_ref() == Some(&id)).cloned().collect();
        found.extend(own.iter().cloned());
        remembered.insert(id, (now, own));
    }
    Ok(found)
}

async fn tags(ctx: &Ctx, ids: &BTreeSet<String>) -> Result<BTreeMap<String, SecurityGroup>, AwsError> {
    let mut found = BTreeMap::new();
    let mut unknown = Vec::new();
    {
        let remembered = lock(&ctx.security.tags);
        for id in ids {
            match remembered.get(id).filter(|(read, _)| read.elapsed() < REMEMBERED) {
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
    let _writing = group.writing.lock().await;
    if group.done.load(Ordering::Acquire) >= ticket {
        return lock(&group.state).clone().unwrap_or_default();
    }
    let up_to = group.asked.load(Ordering::Acquire);
    let mut state = State::default();
    if let Err(error) = write(ctx, id, &mut state).await {
        warn!(group = id, %error, "could not bring a security group to what bindings want");
        state.error = Some(error);
    }
    group.done.store(up_to, Ordering::Release);
    let changed = lock(&group.state).replace(state.clone()).as_ref() != Some(&state);
    if changed {
        let users: Concerned = lock(&ctx.security.claims)
            .iter()
            .filter(|(_, claim)| groups_in(claim).iter().any(|group| *group == id))
            .map(|(key, _)| key.clone())
            .collect();
        ctx.nudge(&users);
    }
    if state.error.is_some() || !state.failed.is_empty() {
        tokio::spawn(settle_later(Arc::clone(ctx), id.to_owned(), Arc::clone(&group)));
    }
    state
}

/// Another pass, unless somebody else's has taken this over in the meantime.
fn settle_later(ctx: Arc<Ctx>, id: String, group: Arc<Group>) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        let up_to = group.asked.load(Ordering::Acquire);
        tokio::time::sleep(AGAIN).await;
        if group.asked.load(Ordering::Acquire) == up_to {
            settle(&ctx, &id).await;
        }
    })
}

async fn write(ctx: &Arc<Ctx>, id: &str, state: &mut State) -> Result<(), AwsError> {
    let settings = &ctx.settings;
    let marker = network::marker(&settings.cluster_name, settings.rule_owner.as_deref());
    let adopt = settings.adopt_unmarked_rules;
    let is_ours = |text: &str| text == marker || (adopt && text == names::RULE_DESCRIPTION);

    let there = ctx.aws.security_group_rules(id).await?;
    state.rules = there.rules.iter().map(|rule| rule.permission.clone()).collect();
    let plan = group_plan(id, &all_claims(ctx), &there, is_ours);
    if settings.observe || !ctx.is_leading() {
        info!(group = id, authorize = plan.authorize.len(), revoke = plan.revoke.len(), "would change");
        return Ok(());
    }
    if !plan.authorize.is_empty() {
        authorize(ctx, id, plan, &marker, state).await?;
    } else if plan.revoke.is_empty() {
        return Ok(());
    }

    // What is revoked is decided on a fresh reading, and on the claims of this moment.
    let mut claims = all_claims(ctx);
    match bindings_elsewhere(ctx).await {
        Ok(elsewhere) => claims.extend(elsewhere),
        Err(error) => {
            warn!(group = id, %error, "could not read the bindings of other namespaces; nothing is revoked");
            return Ok(());
        }
    }
    let there = ctx.aws.security_group_rules(id).await?;
    state.rules = there.rules.iter().map(|rule| rule.permission.clone()).collect();
    let plan = group_plan(id, &claims, &there, is_ours);
    if plan.revoke.is_empty() || !ctx.is_leading() {
        return Ok(());
    }
    let ids: Vec<String> = plan.revoke.iter().map(|(rule, _)| rule.clone()).collect();
    match ctx.aws.revoke(id, &ids).await {
        // Somebody was faster.
        Err(error) if error.code == "InvalidSecurityGroupRuleId.NotFound" => {}
        other => other?,
    }
    info!(group = id, rules = ids.len(), "revoked");
    for (_, permission) in &plan.revoke {
        state.rules.remove(permission);
    }
    Ok(())
}

/// All in one call; if AWS takes exception, one by one, so that one bad source fails alone. In a full group, stale rules
/// of ours become wanted ones.
async fn authorize(
    ctx: &Ctx,
    id: &str,
    plan: network::GroupPlan,
    marker: &str,
    state: &mut State,
) -> Result<(), AwsError> {
    const FULL: &str = "RulesPerSecurityGroupLimitExceeded";
    let all = &plan.authorize;
    match ctx.aws.authorize(id, all, marker).await {
        Ok(()) => {
            info!(group = id, rules = all.len(), "authorized");
            state.rules.extend(all.iter().cloned());
            return Ok(());
        }
        Err(error) if error.class() != tgb_aws::Class::Terminal || error.is_access_denied() => {
            return Err(error);
        }
        Err(error) if error.code == "InvalidGroup.NotFound" && error.message.contains(id) => {
            return Err(error);
        }
        Err(_) => {}
    }
    let mut stale = plan.revoke;
    for permission in all {
        let mut answer = ctx.aws.authorize(id, std::slice::from_ref(permission), marker).await;
        if answer.as_ref().is_err_and(|error| error.code == FULL)
            && let Some((rule, old)) = stale.pop()
        {
            answer = ctx.aws.modify_rule(id, &rule, permission, marker).await;
            state.rules.remove(&old);
        }
        match answer {
            Ok(()) => drop(state.rules.insert(permission.clone())),
            Err(error) if error.code == "InvalidPermission.Duplicate" => {
                state.rules.insert(permission.clone());
            }
            Err(error) => {
                warn!(group = id, %error, "could not authorize a rule");
                state.failed.insert(permission.clone(), error);
            }
        }
    }
    Ok(())
}

/// The claims of all bindings; those that have networking and were not looked at yet are unknown.
fn all_claims(ctx: &Ctx) -> Vec<Claim> {
    let index = ctx.index();
    let claims = lock(&ctx.security.claims);
    index
        .bindings
        .iter()
        .filter(|(_, binding)| binding.spec.networking.is_some())
        .map(|(key, _)| claims.get(key).cloned().unwrap_or(Claim::Unknown))
        .collect()
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
        binding.spec.networking.is_some() && !index.bindings.contains_key(&Key::of(&binding.metadata))
    });
    Ok(elsewhere.map(anywhere).collect())
}
