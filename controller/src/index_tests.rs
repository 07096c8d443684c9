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
                           "targetRef": {"kind": "Pod", "name": format!("x{}", random.usize(..4))}})
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
            index.by_ip.len(),
            index.by_label.len(),
            index.by_instance.len(),
            index.gated.len(),
        ];
        assert_eq!(left, [0; 10], "seed {seed}");
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
