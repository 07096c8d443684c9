//! Whose a target group and its targets are. Decisions only; [`crate::reconcile`] acts on them.

use crate::desired::{Switches, TargetKey, desired, is_of_cluster};
use crate::index::{Index, Key};
use crate::observed::Observed;
use crate::reason::{Kind, Reason};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tgb_api::names;
use tgb_api::rules;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::{Condition, FirstContact, Sharing, Spec, Status, TargetGroupBinding};
use tgb_aws::values::ObservedTarget;

/// A rule that is enforced here again refuses a binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// `TGB402`.
    pub(crate) rule: &'static str,
    pub(crate) reason: Reason,
    /// The rule's id and its sentence.
    pub(crate) message: String,
}

impl Refusal {
    /// AWS has no target group of this ARN.
    pub(crate) fn not_found(arn: &str) -> Self {
        let message = format!("TGB110 there is no target group {arn} in this account and region");
        Self { rule: "TGB110", reason: Reason::TargetGroupNotFound, message }
    }

    /// True if the binding may not speak to AWS at all, not even to clean up: it is the reference or the role that is
    /// refused, not what AWS says about the target group.
    pub(crate) fn forbids_calls(&self) -> bool {
        !matches!(self.rule, "TGB110" | "TGB111" | "TGB112") && !self.is_by_tags()
    }

    /// True if the tags of the target group close it to the binding.
    pub(crate) fn is_by_tags(&self) -> bool {
        matches!(self.rule, "TGB403" | "TGB404")
    }
}

/// The first enforced rule that refuses the binding (a webhook can be bypassed). What has to do with the backend is
/// [`crate::desired`]'s, TGB115 is [`owner`]'s.
pub(crate) fn refused(
    settings: &rules::Settings,
    binding: &TargetGroupBinding,
    group: Option<&TargetGroup>,
    tags: Option<&BTreeMap<String, String>>,
) -> Option<Refusal> {
    let context = rules::Context {
        target_group: group.map_or(rules::Lookup::Unknown, rules::Lookup::Found),
        tags,
        ..Default::default()
    };
    let found = rules::check(rules::Operation::Create, binding, None, &context, settings);
    // Services are found by name here, so that a name that none can have is found to be missing.
    let mut enforced = found.into_iter().filter(|finding| {
        finding.severity == rules::Severity::Deny
            && finding.path != "spec.serviceRef.name"
            && rules::rule(finding.rule).is_some_and(|rule| rule.enforced)
    });
    enforced.next().map(|finding| Refusal {
        rule: finding.rule,
        reason: match finding.rule {
            "TGB101" | "TGB102" | "TGB212" => Reason::InvalidSpec,
            "TGB110" => Reason::TargetGroupNotFound,
            "TGB111" | "TGB112" => Reason::TargetTypeMismatch,
            _ => Reason::NotAllowed,
        },
        message: format!("{} {}", finding.rule, finding.message),
    })
}

/// The binding that owns the target group, `NAMESPACE/NAME`, if this one may not touch it: the oldest that is not
/// terminating, unless both are Shared.
pub(crate) fn owner(index: &Index, binding: &TargetGroupBinding, arn: &str) -> Option<String> {
    let is_shared = |spec: &Spec| spec.target_group.sharing() == Sharing::Shared;
    let (key, owner) = index.bindings_of(arn).find(|(_, other)| !other.is_terminating())?;
    let both_shared = is_shared(&owner.spec) && is_shared(&binding.spec);
    (!is_of(key, binding) && !both_shared).then(|| key.to_string())
}

/// What the other living bindings of a target group want there.
pub(crate) fn wanted_by_others(
    index: &Index,
    switches: &Switches,
    binding: &TargetGroupBinding,
    group: &TargetGroup,
) -> BTreeSet<TargetKey> {
    let others = index.bindings_of(group.arn.as_str());
    others
        .filter(|(key, other)| !other.is_terminating() && !is_of(key, binding))
        .flat_map(|(key, other)| desired(index, &other.whole(key), group, switches).targets.into_keys())
        .collect()
}

// ---- records ----

/// The owner that records name: those on which deregistration rests, the status and the ConfigMap of a Shared binding. A
/// copy that came with a backup names another cluster or another binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mark {
    /// The cluster's name.
    pub(crate) cluster: String,
    /// The binding's UID.
    pub(crate) uid: String,
}

/// The owner of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    /// This binding of this cluster.
    Us,
    /// It names nobody: LBC wrote it, or a version of ours that left no mark.
    Unmarked,
    /// Another binding, or one of another cluster.
    Others,
}

impl Mark {
    pub(crate) fn of(cluster: &str, binding: &TargetGroupBinding) -> Self {
        Self { cluster: cluster.to_owned(), uid: binding.metadata.uid.clone().unwrap_or_default() }
    }

    /// The owner of a record with these marks.
    pub(crate) fn owner(&self, cluster: Option<&str>, uid: Option<&str>) -> Owner {
        match (cluster, uid) {
            (None, None) => Owner::Unmarked,
            (Some(cluster), Some(uid)) if (cluster, uid) == (&*self.cluster, &*self.uid) => Owner::Us,
            _ => Owner::Others,
        }
    }

    /// The owner of what a status tells of targets; `None` if it tells nothing.
    pub(crate) fn owner_of(&self, status: Option<&Status>) -> Option<Owner> {
        let status = status?;
        match &status.first_contact {
            Some(record) => Some(self.owner(Some(&record.cluster), Some(&record.binding_uid))),
            // LBC writes no conditions while all is well.
            None => {
                let is_of_lbc = status.observed_generation.is_some() && status.conditions.is_empty();
                (status.targets.is_some() || is_of_lbc).then_some(Owner::Unmarked)
            }
        }
    }

    /// The record of the first contact in a status, if it is ours.
    pub(crate) fn record<'a>(&self, status: Option<&'a Status>) -> Option<&'a FirstContact> {
        let record = status?.first_contact.as_deref()?;
        let owner = self.owner(Some(&record.cluster), Some(&record.binding_uid));
        (owner == Owner::Us).then_some(record)
    }
}

/// The sharing of a target group at the time of a record.
pub(crate) fn sharing_of(record: &FirstContact) -> Sharing {
    record.sharing.unwrap_or(Sharing::Exclusive)
}

/// A record that begins now. `foreign` are the registered targets that are not this cluster's.
pub(crate) fn first_contact(
    mark: &Mark,
    arn: &str,
    sharing: Sharing,
    foreign: &BTreeSet<TargetKey>,
    now: Timestamp,
) -> FirstContact {
    FirstContact {
        cluster: mark.cluster.as_str().into(),
        binding_uid: mark.uid.clone(),
        target_group_arn: arn.into(),
        sharing: Some(sharing),
        since: Some(Time(now)),
        foreign_targets: entries(foreign),
    }
}

fn entries(keys: &BTreeSet<TargetKey>) -> Vec<String> {
    if keys.len() > FirstContact::MOST_LISTED {
        return vec![FirstContact::ALL.to_owned()];
    }
    keys.iter().map(ToString::to_string).collect()
}

/// Takes out of a record those targets that are not foreign any more: the cluster wants them, or a pod or node of its own
/// has their address now. They do not become foreign again.
pub(crate) fn settle(record: &mut FirstContact, is_own: impl Fn(&TargetKey) -> bool) {
    record.foreign_targets.retain(|entry| !TargetKey::parse(entry).is_some_and(|key| is_own(&key)));
}

/// The registered targets that a record protects.
pub(crate) fn foreign(
    record: &FirstContact,
    observed: &Observed,
    is_own: impl Fn(&TargetKey) -> bool,
) -> BTreeSet<TargetKey> {
    if record.foreign_targets.is_empty() {
        return BTreeSet::new();
    }
    let listed: BTreeSet<TargetKey> =
        record.foreign_targets.iter().filter_map(|entry| TargetKey::parse(entry)).collect();
    let all = record.foreign_targets.iter().any(|entry| entry == FirstContact::ALL);
    let present = observed.targets().keys().filter(|key| observed.present(key).is_some());
    present.filter(|key| (all || listed.contains(key)) && !is_own(key)).cloned().collect()
}

/// The time until which foreign targets are left alone: for ever, where no grace is set.
pub(crate) fn foreign_until(record: &FirstContact, grace: Option<Duration>) -> Option<Timestamp> {
    record.since.as_ref()?.0.checked_add(grace?).ok()
}

/// True for a binding that may have been Shared while no controller looked, so that its ConfigMap is still there: its
/// record says so, or it is one of ours, and how it stands now was not reported yet, or not as well.
pub(crate) fn may_have_been_shared(binding: &TargetGroupBinding, mark: &Mark) -> bool {
    if mark.record(binding.status.as_ref()).is_some_and(|record| sharing_of(record) == Sharing::Shared) {
        return true;
    }
    let is_ours = binding.metadata.finalizers.iter().flatten().any(|entry| entry == names::FINALIZER);
    // A deletion counts as a change of the spec, too.
    let ended = i64::from(binding.is_terminating());
    let is_settled = binding.status.as_ref().is_some_and(|status| {
        let is_ready =
            |condition: &Condition| *condition.type_ == *Kind::Ready.as_str() && *condition.status == *"True";
        status
            .observed_generation
            .is_some_and(|seen| seen + ended >= binding.metadata.generation.unwrap_or_default())
            && status.conditions.iter().any(is_ready)
    });
    is_ours && !is_settled
}

/// The targets of a group that a binding which ends may take away, if no other binding wants them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Right {
    /// These.
    pub(crate) these: BTreeSet<TargetKey>,
    /// And of those that no record names, these.
    pub(crate) rest: Rest,
}

/// Targets that no record names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) enum Rest {
    /// None of them.
    #[default]
    None,
    /// Those with the address of a pod of the binding's namespace.
    OfNamespace,
    /// Those with an address of this cluster.
    OfCluster,
    /// All but these, which are foreign.
    AllBut(BTreeSet<TargetKey>),
}

impl Right {
    /// The right in an Exclusive group: all of it where the record is ours, but for what was foreign at first contact. Where
    /// nobody wrote down whose the targets are, what has an address of this cluster. None by a record of somebody else.
    pub(crate) fn exclusive(
        owner: Option<Owner>,
        record: Option<&FirstContact>,
        foreign: BTreeSet<TargetKey>,
        tracked: Option<&Tracked>,
    ) -> Self {
        let these = tracked.filter(|tracked| tracked.owner == Owner::Us);
        let these = these.map(|tracked| tracked.targets.clone()).unwrap_or_default();
        let rest = match (record, owner) {
            (Some(record), _) if sharing_of(record) == Sharing::Exclusive => Rest::AllBut(foreign),
            // It was Shared, and no pass has seen the change.
            (Some(_), _) | (None, Some(Owner::Unmarked)) => Rest::OfCluster,
            (None, _) => Rest::None,
        };
        Self { these, rest }
    }

    /// The right in a Shared group: what the ConfigMap lists.
    pub(crate) fn shared(record: Option<&FirstContact>, tracked: Option<&Tracked>, index: &Index) -> Self {
        match tracked {
            Some(tracked) if tracked.owner == Owner::Us => {
                Self { these: tracked.targets.clone(), rest: Rest::None }
            }
            Some(tracked) if tracked.owner == Owner::Unmarked => {
                let these = tracked.targets.iter().filter(|key| is_of_cluster(index, key));
                Self { these: these.cloned().collect(), rest: Rest::None }
            }
            // It was Exclusive, and no pass has seen the change.
            None if record.is_some_and(|record| sharing_of(record) == Sharing::Exclusive) => {
                Self { rest: Rest::OfCluster, ..Self::default() }
            }
            Some(_) | None => Self::default(),
        }
    }

    /// True if there is no target that may be taken away.
    pub(crate) fn is_nothing(&self) -> bool {
        self.these.is_empty() && self.rest == Rest::None
    }

    fn covers(&self, index: &Index, namespace: &str, key: &TargetKey) -> bool {
        self.these.contains(key)
            || match &self.rest {
                Rest::None => false,
                Rest::OfNamespace => is_of_namespace(index, namespace, key),
                Rest::OfCluster => is_of_cluster(index, key),
                Rest::AllBut(foreign) => !foreign.contains(key),
            }
    }
}

/// True for the address of a pod of a namespace.
fn is_of_namespace(index: &Index, namespace: &str, key: &TargetKey) -> bool {
    let Ok(ip) = key.id.parse() else { return false };
    index.pods_at(&ip).any(|(pod, _)| *pod.namespace == *namespace)
}

/// The content of the ConfigMap of a Shared binding, and its owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tracked {
    pub(crate) owner: Owner,
    pub(crate) targets: BTreeSet<TargetKey>,
}

impl Tracked {
    /// The listed targets that are this binding's, and those that are not: of a list that names nobody only the addresses
    /// of this cluster, of one that names somebody else none, unless the user agrees.
    pub(crate) fn adopted(
        &self,
        agrees: bool,
        is_own: impl Fn(&TargetKey) -> bool,
    ) -> (BTreeSet<TargetKey>, BTreeSet<TargetKey>) {
        self.targets.iter().cloned().partition(|key| match self.owner {
            Owner::Us => true,
            Owner::Unmarked => agrees || is_own(key),
            Owner::Others => agrees,
        })
    }
}

/// The registered targets that a binding which ends takes away.
pub(crate) fn to_clean_up(
    index: &Index,
    switches: &Switches,
    binding: &TargetGroupBinding,
    group: &TargetGroup,
    seen: &[ObservedTarget],
    right: &Right,
) -> Vec<ObservedTarget> {
    let protected = wanted_by_others(index, switches, binding, group);
    let is_exclusive = binding.spec.target_group.sharing() == Sharing::Exclusive;
    if is_exclusive && never_owned(index, binding, group.arn.as_str()) {
        return Vec::new();
    }
    let present = seen.iter().filter(|seen| seen.state.is_registered());
    present
        .filter(|seen| {
            let key = TargetKey::of(&seen.target);
            right.covers(index, binding.namespace(), &key) && !protected.contains(&key)
        })
        .cloned()
        .collect()
}

/// Whether a binding never was the owner of its target group: an older one lives, or its status says so.
fn never_owned(index: &Index, binding: &TargetGroupBinding, arn: &str) -> bool {
    let created = binding.metadata.creation_timestamp.as_ref().map(|time| time.0);
    let me = (created, Key::of(&binding.metadata));
    let an_older_lives = index
        .bindings_of(arn)
        .any(|(key, other)| !other.is_terminating() && (other.created, key) < (me.0, &me.1));
    let conditions = binding.status.iter().flat_map(|status| &status.conditions);
    let says_so = |condition: &Condition| {
        *condition.type_ == *Kind::TargetGroupResolved.as_str()
            && *condition.reason == *Reason::InUseByAnotherBinding.as_str()
    };
    an_older_lives || conditions.into_iter().any(says_so)
}

fn is_of(key: &Key, binding: &TargetGroupBinding) -> bool {
    (&*key.namespace, &*key.name) == (binding.namespace(), binding.name())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use tgb_api::arn::TargetGroupArn;
    use tgb_aws::values::{TARGET_STATES, Target, TargetState};

    const ARN: &str = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1234567890abcdef";

    fn binding(name: &str, created: i64, more: Value) -> TargetGroupBinding {
        let mut object = json!({
            "metadata": {
                "namespace": "shop",
                "name": name,
                "creationTimestamp": Timestamp::from_second(created).unwrap().to_string(),
            },
            "spec": {"targetGroup": {"arn": ARN, "targetType": "ip"}, "serviceRef": {"name": name}},
        });
        for (key, value) in more.as_object().unwrap() {
            for (inner, value) in value.as_object().unwrap() {
                object[key][inner] = value.clone();
            }
        }
        serde_json::from_value(object).unwrap()
    }

    fn shared() -> Value {
        json!({"spec": {"targetGroup": {"arn": ARN, "targetType": "ip", "sharing": "Shared"}}})
    }

    fn terminating() -> Value {
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}})
    }

    fn index(bindings: &[TargetGroupBinding]) -> Index {
        let mut index = Index::default();
        for binding in bindings {
            index.put_binding(binding.clone());
        }
        index
    }

    #[test]
    fn the_rules_that_are_enforced_again_refuse_with_their_id() {
        let mut settings = rules::Settings {
            region: Some("us-west-2".to_owned()),
            account: Some("123456789012".to_owned()),
            ..Default::default()
        };
        let aws = |target_type: &str, family: &str| TargetGroup {
            arn: TargetGroupArn::parse(ARN).unwrap(),
            target_type: target_type.to_owned(),
            protocol: "HTTP".to_owned(),
            ip_address_type: family.to_owned(),
            vpc_id: None,
            port: Some(80),
            health_check_port: None,
            load_balancer_arns: Vec::new(),
        };
        let group = |more: Value| {
            let mut group = json!({"arn": ARN, "targetType": "ip"});
            for (key, value) in more.as_object().unwrap() {
                group[key] = value.clone();
            }
            binding("a", 1, json!({"spec": {"targetGroup": group}}))
        };
        let (fine, role) = (aws("ip", "ipv4"), "arn:aws:iam::123456789012:role/any");
        let elsewhere = ARN.replace("us-west-2", "eu-west-1");
        let account = ARN.replace("123456789012", "999999999999");
        let cases = [
            (group(json!({"arn": ""})), None, Some(("TGB101", Reason::InvalidSpec))),
            (group(json!({"arn": "nonsense"})), None, Some(("TGB102", Reason::InvalidSpec))),
            (group(json!({"arn": elsewhere})), None, Some(("TGB103", Reason::NotAllowed))),
            (group(json!({"arn": account})), None, Some(("TGB104", Reason::NotAllowed))),
            (group(json!({})), Some(aws("instance", "ipv4")), Some(("TGB111", Reason::TargetTypeMismatch))),
            (group(json!({})), Some(aws("alb", "ipv4")), Some(("TGB111", Reason::TargetTypeMismatch))),
            (
                group(json!({"ipAddressType": "ipv6"})),
                Some(fine.clone()),
                Some(("TGB112", Reason::TargetTypeMismatch)),
            ),
            (
                group(json!({"targetType": "instance", "assumeRole": {"roleARN": role}})),
                None,
                Some(("TGB401", Reason::NotAllowed)),
            ),
            (
                group(json!({"assumeRole": {"roleARN": role.replace("123456789012", "999999999999")}})),
                None,
                Some(("TGB104", Reason::NotAllowed)),
            ),
            (group(json!({"arn": "", "name": "w".repeat(33)})), None, Some(("TGB212", Reason::InvalidSpec))),
            (group(json!({"assumeRole": {"roleARN": role}})), None, Some(("TGB402", Reason::NotAllowed))),
            (group(json!({})), Some(fine.clone()), None),
        ];
        for (binding, aws, want) in cases {
            let found = refused(&settings, &binding, aws.as_ref(), None);
            let found = found.as_ref().map(|refusal| (refusal.rule, refusal.reason));
            assert_eq!(found, want, "{:?}", binding.spec);
        }
        settings.require_tag("team=web");
        settings.namespace_tag = Some("namespaces".to_owned());
        let tags = |all: &[(&str, &str)]| {
            all.iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect::<BTreeMap<_, _>>()
        };
        let tagged = |tags: &BTreeMap<String, String>| {
            refused(&settings, &group(json!({})), Some(&fine), Some(tags)).map(|refusal| refusal.rule)
        };
        assert_eq!(tagged(&tags(&[("namespaces", "shop")])), Some("TGB403"));
        assert_eq!(tagged(&tags(&[("team", "web"), ("namespaces", "other")])), Some("TGB404"));
        assert_eq!(tagged(&tags(&[("team", "web"), ("namespaces", "shop")])), None);
    }

    #[test]
    fn the_oldest_living_binding_owns_a_target_group() {
        let (old, new) = (binding("b", 1, json!({})), binding("a", 2, json!({})));
        let both = index(&[old.clone(), new.clone()]);
        assert_eq!(owner(&both, &new, ARN).as_deref(), Some("shop/b"));
        assert_eq!(owner(&both, &old, ARN), None);
        let after = index(&[binding("b", 1, terminating()), new.clone()]);
        assert_eq!(owner(&after, &new, ARN), None);
        let twins = [binding("a", 1, json!({})), binding("b", 1, json!({}))];
        assert_eq!(owner(&index(&twins), &twins[1], ARN).as_deref(), Some("shop/a"));
    }

    #[test]
    fn shared_bindings_do_not_stand_in_each_others_way_but_an_exclusive_one_does() {
        let all = [binding("a", 1, shared()), binding("b", 2, shared()), binding("c", 3, json!({}))];
        let index = index(&all);
        assert_eq!(owner(&index, &all[1], ARN), None);
        assert_eq!(owner(&index, &all[2], ARN).as_deref(), Some("shop/a"));
    }

    const CLUSTER: &str = "demo";

    fn mark() -> Mark {
        Mark { cluster: CLUSTER.to_owned(), uid: "u1".to_owned() }
    }

    fn keys(ids: &[&str]) -> BTreeSet<TargetKey> {
        ids.iter().map(|id| TargetKey { id: (*id).to_owned(), port: 80 }).collect()
    }

    fn status(value: Value) -> Status {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn a_record_is_ours_only_with_our_cluster_and_the_bindings_uid() {
        let owner = |cluster: Option<&str>, uid: Option<&str>| mark().owner(cluster, uid);
        assert_eq!(owner(Some("demo"), Some("u1")), Owner::Us);
        assert_eq!(owner(None, None), Owner::Unmarked);
        for (cluster, uid) in [
            (Some("other"), Some("u1")),
            (Some("demo"), Some("u2")),
            (Some("demo"), None),
            (None, Some("u1")),
        ] {
            assert_eq!(owner(cluster, uid), Owner::Others, "{cluster:?} {uid:?}");
        }
    }

    #[test]
    fn a_status_tells_whose_targets_it_is_about() {
        let condition = json!({
            "type": "Ready", "status": "False", "reason": "x", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
        });
        let counts = json!({"desired": 1, "registered": 0, "healthy": 0, "unhealthy": 0, "draining": 0});
        let contact = |uid: &str| json!({"cluster": "demo", "bindingUID": uid, "targetGroupARN": ARN, "sharing": "Shared"});
        let cases = [
            (json!({}), None),
            // A pass that failed before it saw the targets.
            (json!({"observedGeneration": 1, "conditions": [condition]}), None),
            // LBC's, and that of a version of ours without marks.
            (json!({"observedGeneration": 1}), Some(Owner::Unmarked)),
            (
                json!({"observedGeneration": 1, "conditions": [condition], "targets": counts}),
                Some(Owner::Unmarked),
            ),
            (json!({"firstContact": contact("u1"), "targets": counts}), Some(Owner::Us)),
            (json!({"firstContact": contact("u2"), "targets": counts}), Some(Owner::Others)),
            (json!({"observedGeneration": 1, "firstContact": {}}), Some(Owner::Others)),
        ];
        for (value, want) in cases {
            let status = status(value.clone());
            assert_eq!(mark().owner_of(Some(&status)), want, "{value}");
            assert_eq!(mark().record(Some(&status)).is_some(), want == Some(Owner::Us), "{value}");
        }
        assert_eq!(mark().owner_of(None), None);
    }

    #[test]
    fn foreign_targets_are_protected_until_the_cluster_has_their_address_or_somebody_agrees() {
        let now = Timestamp::from_second(100).unwrap();
        let mut record =
            first_contact(&mark(), ARN, Sharing::Exclusive, &keys(&["10.9.9.9", "fd00::9"]), now);
        assert_eq!(record.foreign_targets, ["10.9.9.9:80", "[fd00::9]:80"]);
        assert_eq!(
            mark().record(Some(&Status {
                first_contact: Some(Box::new(record.clone())),
                ..Default::default()
            })),
            Some(&record)
        );
        let mut observed = Observed::default();
        let seen = ["10.9.9.9", "fd00::9", "10.9.9.10"].map(|id| ObservedTarget {
            target: Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None },
            state: TargetState::Healthy,
            reason: None,
            description: None,
        });
        observed.show(seen.into(), |_| false, tokio::time::Instant::now());
        // What came later is drift, not foreign.
        assert_eq!(foreign(&record, &observed, |_| false), keys(&["10.9.9.9", "fd00::9"]));
        let is_own = |key: &TargetKey| key.id == "10.9.9.9";
        assert_eq!(foreign(&record, &observed, is_own), keys(&["fd00::9"]));
        // The address was ours once: its target does not become foreign again when the pod is gone.
        settle(&mut record, is_own);
        assert_eq!(foreign(&record, &observed, |_| false), keys(&["fd00::9"]));
        assert_eq!(foreign_until(&record, None), None);
        let until = foreign_until(&record, Some(Duration::from_secs(60)));
        assert_eq!(until, Timestamp::from_second(160).ok());
        // More than fit into the status: everything that is not ours.
        let many: BTreeSet<TargetKey> =
            (1..=1001).map(|port| TargetKey { id: "10.9.9.9".to_owned(), port }).collect();
        let record = first_contact(&mark(), ARN, Sharing::Exclusive, &many, now);
        assert_eq!(record.foreign_targets, ["*"]);
        assert_eq!(foreign(&record, &observed, is_own), keys(&["fd00::9", "10.9.9.10"]));
    }

    #[test]
    fn a_list_of_nobody_is_adopted_for_addresses_of_this_cluster_and_one_of_others_is_not() {
        let adopted = |owner: Owner, agrees: bool| {
            let tracked = Tracked { owner, targets: keys(&["10.0.0.1", "10.9.9.9"]) };
            tracked.adopted(agrees, |key| key.id == "10.0.0.1").0
        };
        let both = keys(&["10.0.0.1", "10.9.9.9"]);
        assert_eq!(adopted(Owner::Us, false), both);
        assert_eq!(adopted(Owner::Unmarked, false), keys(&["10.0.0.1"]));
        assert_eq!(adopted(Owner::Others, false), keys(&[]));
        assert_eq!((adopted(Owner::Unmarked, true), adopted(Owner::Others, true)), (both.clone(), both));
    }

    #[test]
    fn a_change_that_nobody_saw_may_have_ended_sharing() {
        let of = |seen: i64, generation: i64, ready: &str, more: Value| {
            let condition = json!({
                "type": "Ready", "status": ready, "reason": "", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
            });
            let mut binding = binding("a", 1, more);
            binding.metadata.generation = Some(generation);
            binding.metadata.finalizers = Some(vec![names::FINALIZER.to_owned()]);
            binding.status =
                serde_json::from_value(json!({"observedGeneration": seen, "conditions": [condition]}))
                    .unwrap();
            binding
        };
        assert!(!may_have_been_shared(&of(1, 1, "True", json!({})), &mark()));
        assert!(may_have_been_shared(&of(1, 2, "True", json!({})), &mark()));
        assert!(may_have_been_shared(&of(2, 2, "False", json!({})), &mark()));
        assert!(!may_have_been_shared(&of(1, 2, "True", terminating()), &mark()));
        assert!(may_have_been_shared(&of(1, 3, "True", terminating()), &mark()));
        let mut of_nobody = of(1, 2, "True", json!({}));
        of_nobody.metadata.finalizers = None;
        assert!(!may_have_been_shared(&of_nobody, &mark()));
        let shared = first_contact(&mark(), ARN, Sharing::Shared, &keys(&[]), Timestamp::UNIX_EPOCH);
        let mut was_shared = of(1, 1, "True", json!({}));
        was_shared.status.as_mut().unwrap().first_contact = Some(Box::new(shared));
        assert!(may_have_been_shared(&was_shared, &mark()));
    }

    fn group() -> TargetGroup {
        TargetGroup {
            arn: TargetGroupArn::parse(ARN).unwrap(),
            target_type: "ip".to_owned(),
            protocol: "HTTP".to_owned(),
            ip_address_type: "ipv4".to_owned(),
            vpc_id: None,
            port: Some(80),
            health_check_port: None,
            load_balancer_arns: Vec::new(),
        }
    }

    fn cleaned(index: &Index, binding: &TargetGroupBinding, right: &Right) -> Vec<String> {
        let seen: Vec<ObservedTarget> = ["10.0.0.1", "10.0.0.2", "10.9.9.9"]
            .map(|id| ObservedTarget {
                target: Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None },
                state: TargetState::Healthy,
                reason: None,
                description: None,
            })
            .into();
        let found = to_clean_up(index, &Switches::default(), binding, &group(), &seen, right);
        found.into_iter().map(|seen| seen.target.id).collect()
    }

    fn all() -> Right {
        Right { rest: Rest::AllBut(BTreeSet::new()), ..Right::default() }
    }

    /// A pod with an address.
    fn pod(namespace: &str, name: &str, ip: &str) -> tgb_api::objects::Pod {
        serde_json::from_value(json!({
            "metadata": {"namespace": namespace, "name": name, "uid": name},
            "spec": {"containers": []}, "status": {"podIPs": [{"ip": ip}]},
        }))
        .unwrap()
    }

    #[test]
    fn a_binding_that_ends_takes_away_what_it_has_a_right_to() {
        let mine = binding("a", 1, terminating());
        let mut index = index(std::slice::from_ref(&mine));
        index.put_pod(&pod("shop", "p1", "10.0.0.1"));
        index.put_pod(&pod("other", "p2", "10.0.0.2"));
        let record =
            |sharing| first_contact(&mark(), ARN, sharing, &keys(&["10.9.9.9"]), Timestamp::UNIX_EPOCH);
        let (exclusive, shared) = (record(Sharing::Exclusive), record(Sharing::Shared));
        let listed = |owner| Tracked { owner, targets: keys(&["10.0.0.2", "10.9.9.9"]) };
        let of_exclusive = |owner, record: Option<&FirstContact>, tracked: Option<&Tracked>| {
            Right::exclusive(owner, record, keys(&["10.9.9.9"]), tracked)
        };
        let of_shared =
            |record: Option<&FirstContact>, tracked: Option<&Tracked>| Right::shared(record, tracked, &index);
        let (ours, unmarked, theirs) = (listed(Owner::Us), listed(Owner::Unmarked), listed(Owner::Others));
        let cases: Vec<(&str, Right, &[&str])> = vec![
            ("ours", of_exclusive(Some(Owner::Us), Some(&exclusive), None), &["10.0.0.1", "10.0.0.2"]),
            ("unmarked", of_exclusive(Some(Owner::Unmarked), None, None), &["10.0.0.1", "10.0.0.2"]),
            ("of another", of_exclusive(Some(Owner::Others), None, None), &[]),
            ("nothing", of_exclusive(None, None, None), &[]),
            (
                "was Shared",
                of_exclusive(Some(Owner::Us), Some(&shared), Some(&ours)),
                &["10.0.0.1", "10.0.0.2", "10.9.9.9"],
            ),
            ("listed by us", of_shared(Some(&shared), Some(&ours)), &["10.0.0.2", "10.9.9.9"]),
            ("listed by nobody", of_shared(None, Some(&unmarked)), &["10.0.0.2"]),
            ("listed by another", of_shared(Some(&shared), Some(&theirs)), &[]),
            ("no list", of_shared(Some(&shared), None), &[]),
            ("was Exclusive", of_shared(Some(&exclusive), None), &["10.0.0.1", "10.0.0.2"]),
            ("of the namespace", Right { rest: Rest::OfNamespace, ..Right::default() }, &["10.0.0.1"]),
        ];
        for (what, right, want) in cases {
            assert_eq!(cleaned(&index, &mine, &right), want, "{what}");
            assert_eq!(right.is_nothing(), want.is_empty(), "{what}");
        }
    }

    #[test]
    fn what_others_want_is_known_by_the_groups_type_where_their_spec_says_none() {
        let service = json!({
            "metadata": {"namespace": "shop", "name": "b"},
            "spec": {"type": "NodePort", "ports": [{"port": 80, "nodePort": 30080}]},
        });
        let node = json!({
            "metadata": {"name": "n1"}, "spec": {"providerID": "aws:///us-west-2a/i-0123"},
            "status": {"conditions": [{"type": "Ready", "status": "True"}]},
        });
        let mine = binding("a", 1, terminating());
        let other = binding("b", 2, json!({"spec": {"targetGroup": {"arn": ARN}}}));
        let mut index = index(&[mine.clone(), other]);
        index.put_service(&serde_json::from_value(service).unwrap());
        index.put_node(&serde_json::from_value(node).unwrap());
        let group = TargetGroup { target_type: "instance".to_owned(), ..group() };
        let wanted = wanted_by_others(&index, &Switches::default(), &mine, &group);
        assert_eq!(wanted, BTreeSet::from([TargetKey { id: "i-0123".to_owned(), port: 30080 }]));
    }

    #[test]
    fn what_is_registered_is_taken_away_or_foreign_in_every_state_but_draining() {
        let mine = binding("a", 1, terminating());
        let alone = index(std::slice::from_ref(&mine));
        let mut record = first_contact(&mark(), ARN, Sharing::Exclusive, &keys(&[]), Timestamp::UNIX_EPOCH);
        record.foreign_targets = vec![FirstContact::ALL.to_owned()];
        for (state, word, _) in TARGET_STATES {
            let target = Target { id: "10.0.0.1".to_owned(), port: 80, zone: None, quic_server_id: None };
            let seen = vec![ObservedTarget { target, state, reason: None, description: None }];
            let there = usize::from(state.is_registered());
            let goes = to_clean_up(&alone, &Switches::default(), &mine, &group(), &seen, &all());
            assert_eq!(goes.len(), there, "{word}");
            let mut observed = Observed::default();
            observed.show(seen, |_| false, tokio::time::Instant::now());
            assert_eq!(foreign(&record, &observed, |_| false).len(), there, "{word}");
        }
    }

    #[test]
    fn a_binding_that_never_owned_the_group_takes_nothing_away() {
        let (owner, loser) = (binding("a", 1, json!({})), binding("b", 2, terminating()));
        assert!(cleaned(&index(&[owner, loser.clone()]), &loser, &all()).is_empty());
        let condition = json!({
            "type": "TargetGroupResolved", "status": "False", "reason": "InUseByAnotherBinding", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        });
        let mut both_end = loser;
        both_end.status =
            serde_json::from_value(json!({"observedGeneration": 1, "conditions": [condition]})).unwrap();
        let index = index(&[binding("a", 1, terminating()), both_end.clone()]);
        assert!(cleaned(&index, &both_end, &all()).is_empty());
    }
}
