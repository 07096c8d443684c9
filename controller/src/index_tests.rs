//! The index finds what a look at everything finds.

use super::*;
use fastrand::Rng;
use serde_json::{Value, json};

fn read<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn meta(namespace: usize, name: &str) -> Value {
    json!({"namespace": format!("n{namespace}"), "name": name})
}

/// A change of a small world, in which everything is often put, changed and taken away.
fn change(index: &mut Index, random: &mut Rng) {
    let namespace = random.usize(..2);
    let number = random.usize(..4);
    let name = format!("x{number}");
    let key = Key::new(&format!("n{namespace}"), &name);
    let gone = random.u32(..4) == 0;
    let app = format!("a{}", random.usize(..3));
    match random.u32(..5) {
        0 if gone => drop(index.remove_pod(&key)),
        0 => {
            let mut metadata = meta(namespace, &name);
            metadata["labels"] = json!({"app": app, "tier": format!("t{}", random.usize(..2))});
            let pod = json!({"metadata": metadata, "spec": {"nodeName": format!("x{}", random.usize(..4)), "containers": []},
                             "status": {"podIPs": [{"ip": format!("10.0.0.{}", random.usize(1..4))}]}});
            index.put_pod(&read(pod));
        }
        1 if gone => drop(index.remove_service(&key)),
        1 => {
            let selector = match random.u32(..3) {
                0 => json!(null),
                1 => json!({"app": app}),
                _ => json!({"app": app, "tier": "t0"}),
            };
            index.put_service(&read(
                json!({"metadata": meta(namespace, &name), "spec": {"selector": selector}}),
            ));
        }
        2 if gone => drop(index.remove_slice(&key)),
        2 => {
            let endpoints: Vec<Value> = (0..random.usize(..3))
                .map(|_| {
                    json!({"addresses": ["10.0.0.1"], "nodeName": format!("x{}", random.usize(..4)),
                           "targetRef": {"kind": if random.bool() { "Pod" } else { "Machine" },
                                         "name": format!("x{}", random.usize(..4))}})
                })
                .collect();
            let mut metadata = meta(namespace, &name);
            if random.u32(..6) > 0 {
                metadata["labels"] = json!({"kubernetes.io/service-name": format!("x{}", random.usize(..4))});
            }
            index.put_slice(&read(
                json!({"metadata": metadata, "addressType": "IPv4", "ports": [], "endpoints": endpoints}),
            ));
        }
        3 if gone => drop(index.remove_binding(&key)),
        3 => {
            let mut metadata = meta(namespace, &name);
            metadata["creationTimestamp"] = json!(format!("2026-01-01T00:00:0{}Z", random.usize(..3)));
            let target_type = if random.bool() { json!("ip") } else { json!("instance") };
            let group = match random.u32(..3) {
                0 => json!({"name": "web", "targetType": target_type}),
                _ => json!({"arn": format!("arn{}", random.usize(..2)), "targetType": target_type}),
            };
            let status = if random.bool() {
                json!({"targetGroupARN": format!("arn{}", random.usize(..2))})
            } else {
                json!(null)
            };
            index.put_binding(read(json!({
                "metadata": metadata, "status": status,
                "spec": {"targetGroup": group, "serviceRef": {"name": format!("x{}", random.usize(..4))}},
            })));
        }
        _ if gone => drop(index.remove_node(&Key::new("", &name))),
        _ => {
            let id = format!("aws:///us-west-2a/i-{}", random.usize(..3));
            index.put_node(&read(json!({"metadata": {"name": name}, "spec": {"providerID": id}})));
        }
    }
}

fn names_pod(index: &Index, service: &Key, pod: &Key) -> bool {
    service.namespace == pod.namespace
        && index
            .slices(service)
            .flat_map(|slice| &slice.endpoints)
            .any(|e| e.pod.as_deref() == Some(&*pod.name))
}

fn service_of(key: &Key, binding: &Binding) -> Key {
    Key::new(&key.namespace, &binding.spec.service_ref.name)
}

#[test]
fn every_look_up_finds_what_a_look_at_everything_finds() {
    for seed in 0..10 {
        let (mut index, mut random) = (Index::default(), Rng::with_seed(seed));
        for step in 0..400 {
            change(&mut index, &mut random);
            let at = format!("seed {seed}, step {step}");
            for namespace in ["n0", "n1"] {
                for number in 0..4 {
                    let pod = Key::new(namespace, &format!("x{number}"));
                    let uses = |(key, binding): &(&Key, &Binding)| {
                        let service = service_of(key, binding);
                        let there = index.pod(&pod);
                        names_pod(&index, &service, &pod)
                            || service.namespace == pod.namespace
                                && there.zip(index.service(&service)).is_some_and(|((_, pod), service)| {
                                    service.selects(|name| pod.label(name))
                                })
                    };
                    let wanted: Concerned =
                        index.bindings().filter(uses).map(|(key, _)| key.clone()).collect();
                    assert_eq!(index.users_of_pod(&pod), wanted, "pod {pod}, {at}");
                }
            }
            for arn in ["arn0", "arn1"] {
                let mut wanted: Vec<_> = index
                    .bindings()
                    .filter(|(_, binding)| binding.claimed_arn().map(|arn| &**arn) == Some(arn))
                    .collect();
                wanted.sort_by_key(|(key, binding)| (binding.created, (*key).clone()));
                let wanted: Vec<&Key> = wanted.into_iter().map(|(key, _)| key).collect();
                let found: Vec<&Key> = index.bindings_of(arn).map(|(key, _)| key).collect();
                assert_eq!(found, wanted, "{arn}, {at}");
            }
            for number in 1..4 {
                let ip: IpAddr = format!("10.0.0.{number}").parse().unwrap();
                let found: BTreeSet<&Key> = index.pods_at(&ip).map(|(key, _)| key).collect();
                let wanted: BTreeSet<&Key> =
                    index.pods().filter(|(_, pod)| pod.ips.contains(&ip)).map(|(key, _)| key).collect();
                assert_eq!(found, wanted, "{ip}, {at}");
                let id = format!("i-{}", number - 1);
                let is_there = index.nodes.values().any(|node| node.instance_id() == Some(id.as_str()));
                assert_eq!(index.has_instance(&id), is_there, "{id}, {at}");
            }
        }
    }
}

#[test]
fn nothing_is_left_of_what_is_gone() {
    for seed in 0..10 {
        let (mut index, mut random) = (Index::default(), Rng::with_seed(seed));
        for _ in 0..100 {
            change(&mut index, &mut random);
        }
        for key in ["n0", "n1"].iter().flat_map(|n| (0..4).map(move |x| Key::new(n, &format!("x{x}")))) {
            index.remove_binding(&key);
            index.remove_service(&key);
            index.remove_slice(&key);
            index.remove_pod(&key);
            index.remove_node(&key);
        }
        let left = [
            index.bindings.len(),
            index.backends.len(),
            index.slices.len(),
            index.pods.len(),
            index.nodes.len(),
            index.by_arn.len(),
            index.of_instances.len(),
            index.by_ip.len(),
            index.by_node.len(),
            index.bare.len(),
            index.by_label.len(),
            index.by_instance.len(),
            index.gated.len(),
        ];
        assert_eq!(left, [0; 13], "seed {seed}");
    }
}

#[test]
fn a_node_concerns_bindings_of_instances_and_those_with_endpoints_there() {
    let mut index = Index::default();
    for (name, kind) in [("a", "ip"), ("b", "ip"), ("c", "instance")] {
        index.put_binding(read(json!({
            "metadata": meta(0, name), "spec": {"targetGroup": {"arn": name, "targetType": kind}, "serviceRef": {"name": name}},
        })));
    }
    let mut metadata = meta(0, "a-1");
    metadata["labels"] = json!({"kubernetes.io/service-name": "a"});
    index.put_slice(&read(json!({
        "metadata": metadata, "addressType": "IPv4", "ports": [],
        "endpoints": [{"addresses": ["10.0.0.1"], "nodeName": "n1"}],
    })));
    let found = index.put_node(&read(json!({"metadata": {"name": "n1"}})));
    assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), ["n0/a", "n0/c"]);
}

/// A node of few possible states.
fn some_node(name: &str, random: &mut Rng) -> Value {
    let one_of = |random: &mut Rng, all: &[Value]| all[random.usize(..all.len())].clone();
    let feature = random.u32(..9).to_string();
    let labels = one_of(
        random,
        &[
            json!({}),
            json!({"role": "web"}),
            json!({"role": "web", "nobody-asks": feature}),
            json!({"role": "job", "topology.kubernetes.io/zone": "b"}),
            json!({"node.kubernetes.io/exclude-from-external-load-balancers": "", "role": "web"}),
        ],
    );
    let taints = one_of(
        random,
        &[json!([]), json!([]), json!([{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}])],
    );
    let id = one_of(
        random,
        &[json!(format!("aws:///a/i-{name}")), json!(format!("aws:///a/i-{name}")), json!("other")],
    );
    let ready = one_of(random, &[json!("True"), json!("True"), json!("False"), json!("Unknown")]);
    json!({"metadata": {"name": name, "labels": labels}, "spec": {"providerID": id, "taints": taints},
           "status": {"conditions": [{"type": "Ready", "status": ready}]}})
}

/// Nodes `x0` to `x3`, three bindings of instances, one of them for nodes with `role: web`, and one of pods on `x0` and `x1`, of
/// which one is not ready for want of its gate, and of an endpoint without a pod on `x2`.
fn world_of_nodes() -> Index {
    let mut index = Index::default();
    for (name, kind, selector) in [
        ("all", "instance", json!(null)),
        ("web", "instance", json!({"matchLabels": {"role": "web"}})),
        (
            "no-job",
            "instance",
            json!({"matchExpressions": [{"key": "role", "operator": "NotIn", "values": ["job"]}]}),
        ),
        ("pods", "ip", json!(null)),
    ] {
        index.put_binding(read(json!({
            "metadata": meta(0, name),
            "spec": {"targetGroup": {"arn": name, "targetType": kind}, "serviceRef": {"name": name}, "nodeSelector": selector},
        })));
        index.put_service(&read(json!({
            "metadata": meta(0, name),
            "spec": {"type": "NodePort", "ports": [{"port": 80, "protocol": "TCP", "nodePort": 30_080}]},
        })));
    }
    let endpoint = |n: usize, ready: bool| {
        json!({"addresses": [format!("10.0.0.{n}")], "nodeName": format!("x{n}"), "conditions": {"ready": ready},
               "targetRef": {"kind": "Pod", "name": format!("p{n}")}})
    };
    let bare = json!({"addresses": ["10.0.0.2"], "nodeName": "x2", "conditions": {"ready": false}});
    let mut metadata = meta(0, "pods-1");
    metadata["labels"] = json!({"kubernetes.io/service-name": "pods"});
    index.put_slice(&read(json!({
        "metadata": metadata, "addressType": "IPv4", "ports": [{"port": 80, "protocol": "TCP"}],
        "endpoints": [endpoint(0, true), endpoint(1, false), bare],
    })));
    for n in 0..2 {
        index.put_pod(&read(json!({
            "metadata": meta(0, &format!("p{n}")), "spec": {"nodeName": format!("x{n}"), "containers": []},
            "status": {"podIPs": [{"ip": format!("10.0.0.{n}")}],
                       "conditions": [{"type": "ContainersReady", "status": "True"}]},
        })));
    }
    index
}

/// The targets that every binding wants registered, and which of them would count as alive.
fn wanted(index: &Index) -> BTreeMap<Key, (desired::Desired, Vec<bool>)> {
    let switches = desired::Switches { endpoints_fail_open: true, endpoints_without_pods: true };
    let arn = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1234567890abcdef";
    let of = |(key, binding): (&Key, &Binding)| {
        let binding = binding.whole(key);
        let target_type = binding.spec.target_group.target_type.unwrap();
        let group = tgb_api::target_group::TargetGroup {
            arn: tgb_api::arn::TargetGroupArn::parse(arn).unwrap(),
            target_type: if target_type == TargetType::Ip { "ip" } else { "instance" }.to_owned(),
            protocol: "HTTP".to_owned(),
            ip_address_type: "ipv4".to_owned(),
            vpc_id: None,
            port: Some(80),
            health_check_port: None,
            load_balancer_arns: Vec::new(),
        };
        let ids = (0..4)
            .map(|n| if target_type == TargetType::Ip { format!("10.0.0.{n}") } else { format!("i-x{n}") });
        let alive =
            ids.map(|id| desired::is_alive(index, &binding, &desired::TargetKey { id, port: 80 }, None));
        let alive = alive.collect();
        // What is said where there is no node may wait for the next poll: nodes of Fargate come and go with each pod.
        let desired =
            desired::Desired { nothing: None, ..desired::desired(index, &binding, &group, &switches) };
        (key.clone(), (desired, alive))
    };
    index.bindings().map(of).collect()
}

#[test]
fn a_node_concerns_every_binding_that_wants_something_else_since() {
    for seed in 0..20 {
        let (mut index, mut random) = (world_of_nodes(), Rng::with_seed(seed));
        for step in 0..200 {
            let name = format!("x{}", random.usize(..4));
            let before = wanted(&index);
            let found = match random.u32(..6) {
                0 => index.remove_node(&Key::new("", &name)),
                _ => index.put_node(&read(some_node(&name, &mut random))),
            };
            for (key, after) in wanted(&index) {
                // An instance that is back, or came, revives no target that anybody still has.
                let died = before[&key].1.iter().zip(&after.1).any(|(before, after)| *before && !after);
                if before[&key].0 != after.0 || died {
                    assert!(found.contains(&key), "{key} of {found:?}, seed {seed}, step {step}");
                }
            }
        }
    }
}

#[test]
fn what_a_node_says_that_nobody_asks_for_concerns_nobody() {
    let mut index = world_of_nodes();
    let node = |name: &str, labels: Value, ready: &str| {
        read::<objects::Node>(json!({
            "metadata": {"name": name, "labels": labels}, "spec": {"providerID": format!("aws:///a/i-{name}")},
            "status": {"conditions": [{"type": "Ready", "status": ready}]},
        }))
    };
    let names = |found: Concerned| found.iter().map(|key| key.name.to_string()).collect::<Vec<_>>();
    assert_eq!(
        names(index.put_node(&node("x0", json!({"role": "web"}), "True"))),
        ["all", "no-job", "pods", "web"]
    );
    assert!(index.put_node(&node("x0", json!({"role": "web", "feature": "2"}), "True")).is_empty());
    assert_eq!(names(index.put_node(&node("x0", json!({"role": "job"}), "True"))), ["no-job", "web"]);
    // No pod of a binding is on it, and only one of them selects it.
    assert_eq!(names(index.put_node(&node("x3", json!({"role": "job"}), "True"))), ["all"]);
    assert_eq!(names(index.put_node(&node("x3", json!({"role": "job"}), "False"))), ["all"]);
    assert_eq!(names(index.put_node(&node("x1", json!({"role": "job"}), "False"))), ["all", "pods"]);
    assert!(index.put_node(&node("x1", json!({"role": "job"}), "False")).is_empty());
}

#[test]
fn a_service_whose_metadata_change_concerns_nobody() {
    let mut index = world_of_nodes();
    let service = |note: &str, port: u16| {
        let mut metadata = meta(0, "all");
        metadata["annotations"] = json!({"note": note});
        json!({"metadata": metadata, "spec": {"type": "NodePort", "ports": [{"port": port, "protocol": "TCP", "nodePort": 30_080}]}})
    };
    assert!(index.put_service(&read(service("1", 80))).is_empty());
    assert!(index.put_service(&read(service("2", 80))).is_empty());
    assert_eq!(index.put_service(&read(service("2", 81))).len(), 1);
}

#[test]
fn labels_of_many_pods_are_kept_once_and_forgotten_with_the_last() {
    let mut index = Index::default();
    for number in 0..100 {
        let mut metadata = meta(0, &format!("p{number}"));
        metadata["labels"] = json!({"app": "web"});
        index.put_pod(&read(json!({"metadata": metadata, "spec": {"containers": []}})));
    }
    assert_eq!(index.pools.labels.len(), 1);
    for number in 0..100 {
        index.remove_pod(&Key::new("n0", &format!("p{number}")));
    }
    for number in 0..1_000 {
        let mut metadata = meta(0, "p");
        metadata["labels"] = json!({"app": number.to_string()});
        index.put_pod(&read(json!({"metadata": metadata, "spec": {"containers": []}})));
    }
    assert!(
        index.pools.labels.len() < 20,
        "{} sets of labels are kept for one pod",
        index.pools.labels.len()
    );
}

#[test]
fn a_binding_that_cannot_be_read_is_forgotten_when_it_goes_or_is_mended() {
    let mut index = Index::default();
    let keys = |index: &Index| index.binding_keys().map(ToString::to_string).collect::<Vec<_>>();
    let key = Key::new("n0", "x0");
    index.put_unreadable(key.clone(), BTreeSet::new());
    // A list that lacks it has it taken away.
    assert_eq!(keys(&index), ["n0/x0"]);
    index.remove_binding(&key);
    assert!(keys(&index).is_empty() && index.unreadable.is_empty());
    index.put_unreadable(key, BTreeSet::new());
    index.put_binding(read(json!({"metadata": meta(0, "x0"), "spec": {}})));
    assert_eq!((keys(&index), index.unreadable.len()), (vec!["n0/x0".to_owned()], 0));
}
