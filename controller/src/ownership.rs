//! Whose a target group and its targets are. Decisions only; [`crate::reconcile`] acts on them.

use crate::desired::{Switches, TargetKey, desired, is_of_cluster};
use crate::index::{Index, Key, resolved_arn};
use crate::observed::Observed;
use crate::reason::{Kind, Reason};
use k8s_openapi::jiff::Timestamp;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tgb_api::arn::TargetGroupArn;
use tgb_api::names;
use tgb_api::rules;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::{Condition, Sharing, Spec, Status, TargetGroupBinding};
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
    /// Whether the binding may not speak to AWS at all, not even to clean up: it is the reference or the role that is
    /// refused, not what AWS says about the target group.
    pub(crate) fn forbids_calls(&self) -> bool {
        !matches!(self.rule, "TGB110" | "TGB111" | "TGB112")
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
    arn: &str,
) -> BTreeSet<TargetKey> {
    let Ok(parsed) = TargetGroupArn::parse(arn) else { return BTreeSet::new() };
    let others = index.bindings_of(arn);
    others
        .filter(|(key, other)| !other.is_terminating() && !is_of(key, binding))
        .flat_map(|(key, other)| {
            let reference = &other.spec.target_group;
            let group = TargetGroup {
                arn: parsed.clone(),
                target_type: reference.target_type.map_or("ip", |word| word.as_str()).to_owned(),
                protocol: reference.protocol.map_or("", |word| word.as_str()).to_owned(),
                ip_address_type: reference.ip_address_type.map_or("", |word| word.as_str()).to_owned(),
                vpc_id: None,
                port: None,
                health_check_port: None,
                load_balancer_arns: Vec::new(),
            };
            desired(index, &other.whole(key), &group, switches).targets.into_keys()
        })
        .collect()
}

/// Whether the targets of a binding's group were looked at before, as its status tells: it counts them, or it is LBC's,
/// which has no conditions.
pub(crate) fn was_seen(status: &Status) -> bool {
    status.targets.is_some() || (status.observed_generation.is_some() && status.conditions.is_empty())
}

/// When a binding's targets were first seen, if that was not long ago as far as its status tells: now if they never
/// were; else when it was found that others have targets there.
pub(crate) fn first_contact(binding: &TargetGroupBinding, now: Timestamp) -> Option<Timestamp> {
    let Some(status) = binding.status.as_ref().filter(|status| was_seen(status)) else {
        return Some(now);
    };
    let is_foreign = |condition: &&Condition| {
        *condition.type_ == *Kind::TargetsRegistered.as_str()
            && *condition.reason == *Reason::ForeignTargets.as_str()
    };
    status.conditions.iter().find(is_foreign).map(|condition| condition.last_transition_time.0)
}

/// How much longer what is foreign is left alone, if it still is.
pub(crate) fn contact_left(contact: Option<Timestamp>, now: Timestamp, resync: Duration) -> Option<Duration> {
    let waited = Duration::try_from(now.duration_since(contact?)).unwrap_or_default();
    resync.checked_sub(waited).filter(|left| !left.is_zero())
}

/// Whether a binding may have been Shared while no controller looked, so that its ConfigMap is still there: it is one of
/// ours, and how it stands now was not reported yet, or not as well.
pub(crate) fn may_have_been_shared(binding: &TargetGroupBinding) -> bool {
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

/// Registered targets that are neither ours nor of anything in this cluster.
pub(crate) fn foreign(index: &Index, observed: &Observed) -> BTreeSet<TargetKey> {
    let targets = observed.targets().iter();
    targets
        .filter(|(key, seen)| {
            seen.state.is_registered() && !observed.is_ours(key) && !is_of_cluster(index, key)
        })
        .map(|(key, _)| key.clone())
        .collect()
}

/// Which targets a binding that ends takes away: of what is registered, what is its own and no other binding wants.
pub(crate) fn to_clean_up(
    index: &Index,
    switches: &Switches,
    binding: &TargetGroupBinding,
    arn: &str,
    seen: &[ObservedTarget],
    tracked: Option<&BTreeSet<TargetKey>>,
    foreign: &BTreeSet<TargetKey>,
) -> Vec<ObservedTarget> {
    let protected = wanted_by_others(index, switches, binding, arn);
    let never_owned = tracked.is_none() && never_owned(index, binding, arn);
    let is_own = |key: &TargetKey| match tracked {
        Some(tracked) => tracked.contains(key),
        None => !never_owned && !foreign.contains(key),
    };
    let present = seen.iter().filter(|seen| seen.state.is_registered());
    present
        .filter(|seen| {
            let key = TargetKey::of(&seen.target);
            is_own(&key) && !protected.contains(&key)
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

/// The target group that a binding which ends has worked on: what was resolved, else what it names.
pub(crate) fn arn_to_clean_up(binding: &TargetGroupBinding) -> Option<&str> {
    resolved_arn(binding).or_else(|| binding.spec.target_group.arn())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
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

    #[test]
    fn first_contact_lasts_for_one_resync_also_over_a_restart() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        let resync = Duration::from_secs(600);
        let contact = |more: Value| first_contact(&binding("a", 1, more), at(50));
        assert_eq!(contact(json!({})), Some(at(50)));
        let status = |reason: &str, targets: Value| {
            let condition = json!({
                "type": "TargetsRegistered", "status": "False", "reason": reason, "message": "",
                "lastTransitionTime": at(10).to_string(),
            });
            json!({"status": {"observedGeneration": 1, "conditions": [condition], "targets": targets}})
        };
        let counts = json!({"desired": 1, "registered": 0, "healthy": 0, "unhealthy": 0, "draining": 0});
        assert_eq!(contact(status("ForeignTargets", counts.clone())), Some(at(10)));
        assert_eq!(contact(status("Registered", counts)), None);
        // Passes that failed before they saw the targets are no contact; a binding that LBC has worked on is known.
        assert_eq!(contact(status("RegistrationFailed", Value::Null)), Some(at(50)));
        assert_eq!(contact(json!({"status": {"observedGeneration": 1}})), None);
        assert_eq!(contact_left(Some(at(10)), at(50), resync), Some(Duration::from_secs(560)));
        assert_eq!(contact_left(Some(at(10)), at(610), resync), None);
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
        assert!(!may_have_been_shared(&of(1, 1, "True", json!({}))));
        assert!(may_have_been_shared(&of(1, 2, "True", json!({}))));
        assert!(may_have_been_shared(&of(2, 2, "False", json!({}))));
        assert!(!may_have_been_shared(&of(1, 2, "True", terminating())));
        assert!(may_have_been_shared(&of(1, 3, "True", terminating())));
        let mut of_nobody = of(1, 2, "True", json!({}));
        of_nobody.metadata.finalizers = None;
        assert!(!may_have_been_shared(&of_nobody));
    }

    fn cleaned(
        index: &Index,
        binding: &TargetGroupBinding,
        tracked: Option<&[&str]>,
        foreign: &[&str],
    ) -> Vec<String> {
        let key = |id: &&str| TargetKey { id: (*id).to_owned(), port: 80 };
        let seen: Vec<ObservedTarget> = ["10.0.0.1", "10.0.0.2"]
            .map(|id| ObservedTarget {
                target: Target { id: id.to_owned(), port: 80, zone: None, quic_server_id: None },
                state: TargetState::Healthy,
                reason: None,
                description: None,
            })
            .into();
        let tracked = tracked.map(|ids| ids.iter().map(key).collect());
        let foreign = foreign.iter().map(key).collect();
        let switches = Switches::default();
        let found = to_clean_up(index, &switches, binding, ARN, &seen, tracked.as_ref(), &foreign);
        found.into_iter().map(|seen| seen.target.id).collect()
    }

    #[test]
    fn a_binding_that_ends_takes_away_what_is_its_own() {
        let mine = binding("a", 1, terminating());
        let alone = index(std::slice::from_ref(&mine));
        assert_eq!(cleaned(&alone, &mine, None, &[]), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(cleaned(&alone, &mine, None, &["10.0.0.2"]), ["10.0.0.1"]);
        assert_eq!(cleaned(&alone, &mine, Some(&["10.0.0.2"]), &[]), ["10.0.0.2"]);
        assert!(cleaned(&alone, &mine, Some(&[]), &[]).is_empty());
    }

    #[test]
    fn what_is_registered_is_taken_away_or_foreign_in_every_state_but_draining() {
        let mine = binding("a", 1, terminating());
        let alone = index(std::slice::from_ref(&mine));
        for (state, word, _) in TARGET_STATES {
            let target = Target { id: "10.0.0.1".to_owned(), port: 80, zone: None, quic_server_id: None };
            let seen = vec![ObservedTarget { target, state, reason: None, description: None }];
            let (none, there) = (BTreeSet::new(), usize::from(state.is_registered()));
            let switches = Switches::default();
            let all = seen.iter().map(|seen| TargetKey::of(&seen.target)).collect();
            for tracked in [None, Some(&all)] {
                let goes = to_clean_up(&alone, &switches, &mine, ARN, &seen, tracked, &none);
                assert_eq!(goes.len(), there, "{word}");
            }
            let mut observed = Observed::default();
            observed.show(seen, |_| false, tokio::time::Instant::now());
            assert_eq!(foreign(&alone, &observed).len(), there, "{word}");
        }
    }

    #[test]
    fn a_binding_that_never_owned_the_group_takes_nothing_away() {
        let (owner, loser) = (binding("a", 1, json!({})), binding("b", 2, terminating()));
        assert!(cleaned(&index(&[owner, loser.clone()]), &loser, None, &[]).is_empty());
        let condition = json!({
            "type": "TargetGroupResolved", "status": "False", "reason": "InUseByAnotherBinding", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        });
        let mut both_end = loser;
        both_end.status =
            serde_json::from_value(json!({"observedGeneration": 1, "conditions": [condition]})).unwrap();
        let index = index(&[binding("a", 1, terminating()), both_end.clone()]);
        assert!(cleaned(&index, &both_end, None, &[]).is_empty());
    }
}
