//! What the controller does about targets, shown from the outside: each test provokes a situation and reads the target
//! group, the status and the events, as an operator would.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use awsim::{Call, Effect, Fault, Probe, Role, Service};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};
use tgb_e2e::{Prepare, Space, World, eventually, get};

const SOON: Duration = Duration::from_secs(60);
/// Long enough that a fast loop would have done harm, short enough to wait for.
const A_WHILE: Duration = Duration::from_secs(2);

fn prepare(name: &str) -> Prepare<'static> {
    World::shared().unwrap().prepare(name)
}

fn space(name: &str) -> Space<'static> {
    prepare(name).start().unwrap()
}

/// Pods `web`, a target group with a load balancer, and the binding of both.
fn bound(space: &Space<'_>, pods: usize) -> String {
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", pods).unwrap();
    until_endpoints(space, "web", pods);
    space.bind("web", &arn, &json!({})).unwrap();
    space.until_pods_are_targets(&arn, "web", pods).unwrap();
    arn
}

/// A condition's status, reason and message.
fn condition(space: &Space<'_>, binding: &str, kind: &str) -> Result<(String, String, String), String> {
    let object = space.kubectl(&format!("get tgb {binding} -o json")).json()?;
    let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = all
        .iter()
        .find(|condition| condition["type"] == kind)
        .ok_or_else(|| format!("no {kind}: {object}"))?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Ok((text("status"), text("reason"), text("message")))
}

/// Waits until a condition of binding `web` has this status and reason; gives its message.
fn until(space: &Space<'_>, kind: &str, status: &str, reason: &str) -> String {
    eventually(SOON, || {
        let (now, why, message) = condition(space, "web", kind)?;
        if (now.as_str(), why.as_str()) == (status, reason) {
            Ok(message)
        } else {
            Err(format!("{now} {why} {message}"))
        }
    })
    .unwrap_or_else(|error| panic!("{kind} {status} {reason}: {error}"))
}

/// Waits until a condition of binding `web` says so.
fn until_message(space: &Space<'_>, kind: &str, want: &str) {
    eventually(SOON, || match condition(space, "web", kind)? {
        (_, _, message) if message.contains(want) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap_or_else(|error| panic!("{kind} does not say {want:?}: {error}"));
}

/// The events on a binding: reason and note.
fn events(space: &Space<'_>, binding: &str) -> Vec<(String, String)> {
    let all = space.kubectl("get events.events.k8s.io -o json").json().unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let of_it = all["items"].as_array().unwrap().iter().filter(|event| {
        event["regarding"]["name"] == binding && event["regarding"]["kind"] == "TargetGroupBinding"
    });
    of_it.map(|event| (text(&event["reason"]), text(&event["note"]))).collect()
}

fn until_event(space: &Space<'_>, reason: &str) -> String {
    eventually(SOON, || {
        let all = events(space, "web");
        all.iter().find(|(found, _)| found == reason).map(|(_, note)| note.clone()).ok_or(all)
    })
    .unwrap_or_else(|error| panic!("no event {reason}: {error}"))
}

/// Holds for a while.
fn stays(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + A_WHILE;
    while Instant::now() < end {
        assert!(condition(), "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// As if the webhook had been bypassed, or installed later.
fn bypass_webhook(space: &Space<'_>) {
    for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
        space.kubectl(&format!("delete {kind} tgb-{}", space.name())).ok().unwrap();
    }
}

/// From now on the pods' addresses are in no subnet of the VPC.
fn pods_are_outside(space: &Space<'_>) {
    let pods = "10.244.0.0/16".parse().ok();
    space.seed(|aws| aws.subnets.retain(|_, subnet| subnet.cidr != pods)).unwrap();
    space.controller().stop().unwrap();
    space.controller().restart().unwrap();
}

/// Waits until a Service has so many ready endpoints.
fn until_endpoints(space: &Space<'_>, service: &str, count: usize) {
    eventually(SOON, || {
        let line = format!("get endpointslices -l kubernetes.io/service-name={service} -o json");
        let slices = space.kubectl(&line).json()?;
        let slices = slices["items"].as_array().cloned().unwrap_or_default();
        let endpoints = slices.iter().filter_map(|slice| slice["endpoints"].as_array()).flatten();
        match endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count() {
            n if n == count => Ok(()),
            n => Err(format!("{n} ready endpoints")),
        }
    })
    .unwrap();
}

/// New targets become healthy after so long; those that are there have been healthy for a while.
fn registration_takes(space: &Space<'_>, ms: u64) {
    space.advance(Duration::from_millis(2 * ms)).unwrap();
    space.timing(|timing| timing.alb_registration_ms = ms).unwrap();
}

fn annotate(space: &Space<'_>, object: &str, annotation: &str) {
    space.kubectl(&format!("annotate {object} --overwrite {annotation}")).ok().unwrap();
}

fn elb(calls: &[Call]) -> Vec<&str> {
    calls.iter().filter(|call| call.service == Service::Elb).map(|call| call.action.as_str()).collect()
}

// ---- calls ----

#[test]
fn three_calls_register_a_binding_and_one_each_change_of_endpoints() {
    let space = space("calls");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 2).unwrap();
    until_endpoints(&space, "web", 2);
    // what the webhook asks is not counted
    space.controller().pause().unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let before = space.calls().len();
    space.controller().resume().unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    let calls = space.calls().split_off(before);
    assert_eq!(elb(&calls), ["DescribeTargetGroups", "DescribeTargetHealth", "RegisterTargets"]);
    for (replicas, action) in [(3, "RegisterTargets"), (2, "DeregisterTargets")] {
        // the new targets are looked at once more, and then no more
        let looks = space.count("DescribeTargetHealth");
        eventually(
            SOON,
            || if space.count("DescribeTargetHealth") > looks { Ok(()) } else { Err("no look") },
        )
        .unwrap();
        let before = space.calls().len();
        space.kubectl(&format!("scale deployment web --replicas={replicas}")).ok().unwrap();
        space.until_pods_are_targets(&arn, "web", replicas).unwrap();
        let calls = space.calls().split_off(before);
        assert_eq!(elb(&calls), [action]);
    }
}

#[test]
fn changes_during_a_call_join_the_next_one() {
    let space = space("joined");
    let arn = bound(&space, 1);
    space.fault(Fault::new(Effect::Latency { ms: 700 }).action("RegisterTargets")).unwrap();
    let before = space.count("RegisterTargets");
    space.kubectl("scale deployment web --replicas=30").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 30).unwrap();
    let calls = space.count("RegisterTargets") - before;
    assert!(calls <= 10, "{calls} calls for 29 pods");
}

#[test]
fn what_others_change_by_hand_is_put_right_at_the_next_look() {
    let space = prepare("drift").controller("--health-poll=1s").start().unwrap();
    let arn = bound(&space, 2);
    let pods = space.pods("web", 8080).unwrap();
    let one = pods.first().unwrap();
    space.change_target("DeregisterTargets", &arn, one).unwrap();
    space.until_targets(&arn, &pods).unwrap();
    let parameters = [
        ("TargetGroupArn", arn.as_str()),
        ("Targets.member.1.Id", "10.9.9.9"),
        ("Targets.member.1.Port", "80"),
        ("Targets.member.1.AvailabilityZone", "all"),
    ];
    space.call("RegisterTargets", &parameters).unwrap();
    space.until_targets(&arn, &pods).unwrap();
}

// ---- which targets ----

#[test]
fn an_ipv6_target_group_gets_the_pods_ipv6_addresses() {
    let space = space("six");
    let arn = space.target_group_with("HTTP", 80, "ip", &[("IpAddressType", "ipv6")]).unwrap();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"nodeName": "node-1", "containers": [{"name": "web", "image": "web"}]},
    });
    space.apply(&pod).ok().unwrap();
    let ip = eventually(SOON, || {
        let ip = space.kubectl("get pod web -o jsonpath={.status.podIP}").ok()?;
        if ip.is_empty() { Err("no address yet".to_owned()) } else { Ok(ip) }
    })
    .unwrap();
    let patch = json!({"status": {"podIPs": [{"ip": ip}, {"ip": "fd00::7"}]}}).to_string();
    space.kubectl_with(&["patch", "pod", "web", "--subresource=status", "-p", &patch], "").ok().unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80, "targetPort": 8080}], "clusterIP": "None"},
    });
    space.apply(&service).ok().unwrap();
    for (family, address) in [("IPv4", ip.as_str()), ("IPv6", "fd00::7")] {
        let slice = json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": format!("web-{}", family.to_lowercase()), "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": family, "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": [address], "conditions": {"ready": true},
                "targetRef": {"kind": "Pod", "name": "web", "namespace": space.name()}}],
        });
        space.apply(&slice).ok().unwrap();
    }
    bypass_webhook(&space); // it knows from the Service that this one has no IPv6
    space.bind("web", &arn, &json!({})).unwrap();
    space.until_targets(&arn, &BTreeSet::from(["fd00::7:8080".to_owned()])).unwrap();
}

#[test]
fn without_cross_zone_balancing_targets_outside_of_the_vpc_get_their_nodes_zone() {
    let zones_of = |space: &Space<'_>, arn: &str| -> BTreeSet<String> {
        space.health(arn).unwrap().into_iter().filter_map(|target| target.zone).collect()
    };
    let space = space("zones");
    pods_are_outside(&space);
    space.deploy("web", 4).unwrap();
    let nodes: BTreeSet<String> =
        space.aws().lab().instances.iter().map(|(_, zone, _)| zone.clone()).collect();
    let off = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.attribute(&off, "load_balancing.cross_zone.enabled", "false").unwrap();
    space.bind("web", &off, &json!({})).unwrap();
    space.until_pods_are_targets(&off, "web", 4).unwrap();
    let found = zones_of(&space, &off);
    assert!(!found.is_empty() && found.is_subset(&nodes), "{found:?}");
    assert_eq!(space.count("RegisterTargets"), 1, "the attributes tell before AWS refuses");
    // who may not read the attributes learns from AWS's refusal
    space.fault(Fault::new(Effect::Deny).action("DescribeTargetGroupAttributes")).unwrap();
    let learned = space.target_group("HTTP", 81, "ip").unwrap();
    space.attribute(&learned, "load_balancing.cross_zone.enabled", "false").unwrap();
    space.bind("learned", &learned, &json!({"serviceRef": {"name": "web"}})).unwrap();
    space.until_pods_are_targets(&learned, "web", 4).unwrap();
    // and everywhere else it is all zones
    let on = space.target_group("TCP", 82, "ip").unwrap();
    space.bind("on", &on, &json!({"serviceRef": {"name": "web"}})).unwrap();
    space.until_pods_are_targets(&on, "web", 4).unwrap();
    assert_eq!(zones_of(&space, &on), BTreeSet::from(["all".to_owned()]));
}

#[test]
fn a_quic_target_has_its_pods_id_and_a_changed_one_is_registered_anew() {
    let space = prepare("quic").controller("--health-poll=1s").start().unwrap();
    let arn = space.target_group("TCP_QUIC", 443, "ip").unwrap();
    let pod = |name: &str, env: Value| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"containers": [
                {"name": "web", "image": "web", "ports": [{"containerPort": 8080}], "env": env},
            ]},
        })
    };
    let id = json!([{"name": "AWS_LBC_QUIC_SERVER_ID", "value": "AQIDBAUGBwg="}]);
    space.apply(&pod("with", id)).ok().unwrap();
    space.apply(&pod("without", json!([]))).ok().unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 443, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let message = eventually(SOON, || {
        let (_, _, message) = condition(&space, "web", "TargetsRegistered")?;
        if message.starts_with("1 of 1") { Ok(message) } else { Err(message) }
    })
    .unwrap();
    assert!(message.contains("has no QUIC server id"), "{message}");
    let ids = || -> Vec<Option<String>> {
        let of_group = |aws: &mut awsim::Aws| {
            aws.target_groups[&arn]
                .targets
                .values()
                .map(|t| t.quic_server_id.as_deref().map(str::to_owned))
                .collect()
        };
        space.seed(of_group).unwrap()
    };
    let right = vec![Some("0x0102030405060708".to_owned())];
    assert_eq!(ids(), right);
    space
        .seed(|aws| {
            for target in aws.target_groups.get_mut(&arn).unwrap().targets.values_mut() {
                target.quic_server_id = Some("0x00000000000000ff".into());
            }
        })
        .unwrap();
    eventually(SOON, || if ids() == right { Ok(()) } else { Err(ids()) }).unwrap();
}

#[test]
fn a_recreated_service_with_another_node_port_moves_the_targets() {
    let space = prepare("nodeport").controller("--missing-backend-grace=60s").start().unwrap();
    space.deploy("web", 1).unwrap();
    let port = space.node_port("web").unwrap();
    let arn = space.target_group("HTTP", port, "instance").unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let at = |port: u16| -> BTreeSet<String> {
        space.aws().lab().instances.iter().map(|(id, ..)| format!("{id}:{port}")).collect()
    };
    space.until_targets(&arn, &at(port)).unwrap();
    let other = if port == 32_100 { 32_101 } else { 32_100 };
    let patch = json!([{"op": "replace", "path": "/spec/ports/0/nodePort", "value": other}]).to_string();
    // TGB206 refuses it while the webhook looks at Services, as it should
    bypass_webhook(&space);
    space.kubectl_with(&["patch", "service", "web", "--type=json", "-p", &patch], "").ok().unwrap();
    space.until_targets(&arn, &at(other)).unwrap();
}

#[test]
fn a_node_without_instance_is_named_and_blocks_nobody() {
    let space = space("odd");
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": "odd", "labels": {"odd": "true"}, "annotations": {"tgb.e2e/ip": "192.168.9.9"}},
        "spec": {"providerID": "kind://odd", "podCIDR": "10.244.9.0/24", "unschedulable": true},
    });
    space.apply(&node).ok().unwrap();
    space.deploy("web", 1).unwrap();
    let port = space.node_port("web").unwrap();
    let arn = space.target_group("HTTP", port, "instance").unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let instances = &space.aws().lab().instances;
    space.until_targets(&arn, &instances.iter().map(|(id, ..)| format!("{id}:{port}")).collect()).unwrap();
    eventually(SOON, || {
        let (status, _, message) = condition(&space, "web", "TargetsRegistered")?;
        let is_named = message.contains("node odd has no EC2 instance in its providerID \"kind://odd\"");
        if status == "True" && is_named { Ok(()) } else { Err(message) }
    })
    .unwrap();
}

#[test]
fn endpoints_without_pods_count_only_if_the_operator_says_so_and_bad_ones_are_named() {
    let space = space("bare-endpoints");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.1.1.1"]}, {"addresses": ["10.1.1.2"]}, {"addresses": ["8.8.8.8"]}],
    });
    space.apply(&slice).ok().unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    until(&space, "Ready", "True", "Reconciled");
    assert!(space.targets(&arn).unwrap().is_empty());
    space.controller().restart_with(&["--endpoints-without-pods"]).unwrap();
    let good = BTreeSet::from(["10.1.1.1:8080".to_owned(), "10.1.1.2:8080".to_owned()]);
    space.until_targets(&arn, &good).unwrap();
    let message = until(&space, "TargetsRegistered", "False", "TargetsRejected");
    assert!(message.contains("8.8.8.8:8080") && message.contains("publicly routable"), "{message}");
    assert!(until_event(&space, "TargetsRejected").contains("8.8.8.8:8080"));
    // tried again with backoff, not in a loop
    let calls = space.count("RegisterTargets");
    assert!(calls <= 6, "{calls} calls");
}

// ---- whose ----

#[test]
fn a_renamed_binding_never_loses_a_target() {
    let space = space("renamed");
    let arn = bound(&space, 2);
    let pods = space.pods("web", 8080).unwrap();
    bypass_webhook(&space); // TGB115 would ask to delete the old one first
    // Of two from the same second the first by name is the owner.
    space.bind("web-new", &arn, &json!({"serviceRef": {"name": "web"}})).unwrap();
    eventually(SOON, || match condition(&space, "web-new", "Ready")? {
        (_, reason, message) if reason == "InUseByAnotherBinding" => {
            assert!(message.contains("TGB115") && message.contains("renamed/web"), "{message}");
            Ok(())
        }
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    assert_eq!(condition(&space, "web-new", "Stalled").unwrap().0, "True");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    eventually(SOON, || match condition(&space, "web-new", "Ready")? {
        (status, ..) if status == "True" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    assert_eq!(space.targets(&arn).unwrap(), pods);
    assert_eq!((space.count("RegisterTargets"), space.count("DeregisterTargets")), (1, 0));
    // and a loser that goes takes nothing with it
    space.bind("web-loser", &arn, &json!({"serviceRef": {"name": "web"}})).unwrap();
    space.kubectl("delete tgb web-loser --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), pods);
}

#[test]
fn a_binding_that_moves_to_another_namespace_takes_the_group_over() {
    let space = prepare("moved").namespace("moved-2").start().unwrap();
    let arn = bound(&space, 1);
    bypass_webhook(&space);
    let there = |line: &[&str], stdin: &str| {
        space.cluster().kubectl_with(&[&["-n", "moved-2"], line].concat(), stdin)
    };
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "web", "image": "web"}]},
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    for object in [pod, service, space.binding("web", &arn, &json!({}))] {
        there(&["apply", "-f", "-"], &object.to_string()).ok().unwrap();
    }
    let ip = eventually(SOON, || {
        let ip = there(&["get", "pod", "web", "-o", "jsonpath={.status.podIP}"], "").ok()?;
        if ip.is_empty() { Err("no address yet".to_owned()) } else { Ok(ip) }
    })
    .unwrap();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    space.until_targets(&arn, &BTreeSet::from([format!("{ip}:8080")])).unwrap();
}

#[test]
fn foreign_targets_are_left_alone_for_one_resync() {
    let space = prepare("foreign").controller("--resync=8s").controller("--health-poll=1s").start().unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    let parameters = [
        ("TargetGroupArn", arn.as_str()),
        ("Targets.member.1.Id", "10.9.9.9"),
        ("Targets.member.1.Port", "80"),
        ("Targets.member.1.AvailabilityZone", "all"),
    ];
    space.call("RegisterTargets", &parameters).unwrap();
    space.deploy("web", 1).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let message = until(&space, "TargetsRegistered", "False", "ForeignTargets");
    assert!(message.contains("10.9.9.9:80"), "{message}");
    assert!(until_event(&space, "ForeignTargets").contains("10.9.9.9:80"));
    let mut all = space.pods("web", 8080).unwrap();
    all.insert("10.9.9.9:80".to_owned());
    assert_eq!(space.targets(&arn).unwrap(), all);
    // a restart does not make it forget
    space.controller().stop().unwrap();
    space.controller().restart().unwrap();
    space.controller().until_ready(SOON).unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "TargetsRegistered", "True", "Registered");
}

#[test]
fn a_shared_group_keeps_what_others_registered_and_the_config_map_is_lbcs() {
    let space = prepare("shared").value("sharedTargets.namespaces={shared}").start().unwrap();
    let arn = bound(&space, 2);
    let pods = space.pods("web", 8080).unwrap();
    let config_map = || space.kubectl("get configmap aws-lbc-targets-web -o jsonpath={.data.targets}");
    let listed = |pods: &BTreeSet<String>| pods.iter().cloned().collect::<Vec<_>>().join(",");
    // Exclusive becomes Shared: what is registered and wanted is its own
    let shared = json!({"targetGroup": {"arn": arn, "sharing": "Shared"}});
    space.bind("web", &arn, &shared).unwrap();
    eventually(SOON, || match config_map().ok()? {
        text if text == listed(&pods) => Ok(()),
        other => Err(other),
    })
    .unwrap();
    let parameters = [
        ("TargetGroupArn", arn.as_str()),
        ("Targets.member.1.Id", "10.9.9.9"),
        ("Targets.member.1.Port", "80"),
        ("Targets.member.1.AvailabilityZone", "all"),
    ];
    space.call("RegisterTargets", &parameters).unwrap();
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    let with_theirs = |count: usize| {
        eventually(SOON, || {
            let mut all = space.pods("web", 8080)?;
            let is_right = all.len() == count;
            all.insert("10.9.9.9:80".to_owned());
            let there = space.targets(&arn)?;
            if is_right && there == all { Ok(()) } else { Err(format!("{there:?}")) }
        })
        .unwrap();
    };
    with_theirs(3);
    assert_eq!(config_map().ok().unwrap(), listed(&space.pods("web", 8080).unwrap()));
    space.kubectl("scale deployment web --replicas=1").ok().unwrap();
    with_theirs(1);
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), BTreeSet::from(["10.9.9.9:80".to_owned()]));
    config_map().refused().unwrap();
}

#[test]
fn a_role_that_may_not_be_assumed_never_is_not_even_when_the_binding_is_deleted() {
    let space = space("role");
    bypass_webhook(&space);
    space.deploy("web", 1).unwrap();
    let arn = "arn:aws:elasticloadbalancing:us-west-2:999999999999:targetgroup/web/1234567890abcdef";
    let role = json!({"targetGroup": {
        "arn": arn, "targetType": "ip", "assumeRole": {"roleARN": "arn:aws:iam::999999999999:role/any"},
    }});
    space.bind("web", arn, &role).unwrap();
    let message = until(&space, "TargetGroupResolved", "False", "NotAllowed");
    assert!(message.contains("TGB402"), "{message}");
    assert_eq!(condition(&space, "web", "Stalled").unwrap().1, "NotAllowed");
    // as if an attacker had set it
    let patch = json!({"metadata": {"finalizers": ["elbv2.k8s.aws/resources"]}}).to_string();
    space.kubectl_with(&["patch", "tgb", "web", "--type=merge", "-p", &patch], "").ok().unwrap();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.count("AssumeRole"), 0);
}

#[test]
fn frozen_rules_hold_without_the_webhook() {
    let space = prepare("frozen").controller("--require-target-group-tag=team=web").start().unwrap();
    bypass_webhook(&space);
    space.deploy("web", 1).unwrap();
    let reason = |name: &str, arn: &str, more: Value, kind: &str| {
        let mut more = more;
        more["serviceRef"] = more.get("serviceRef").cloned().unwrap_or(json!({"name": "web"}));
        space.bind(name, arn, &more).unwrap();
        eventually(SOON, || match condition(&space, name, kind)? {
            (status, reason, message) if status == "False" => Ok((reason, message)),
            other => Err(format!("{other:?}")),
        })
        .unwrap()
    };
    let says = |(reason, message): (String, String), want: &str, rule: &str| {
        assert!(reason == want && message.contains(rule), "{reason}: {message}, not {want} {rule}");
    };
    let group = "TargetGroupResolved";
    let untagged = space.target_group("HTTP", 80, "ip").unwrap();
    says(reason("untagged", &untagged, json!({}), group), "NotAllowed", "TGB403");
    let tag = |arn: &str| {
        let tag =
            [("ResourceArns.member.1", arn), ("Tags.member.1.Key", "team"), ("Tags.member.1.Value", "web")];
        space.call("AddTags", &tag).unwrap();
    };
    let elsewhere = "arn:aws:elasticloadbalancing:eu-west-1:999999999999:targetgroup/web/1234567890abcdef";
    says(reason("region", elsewhere, json!({}), group), "NotAllowed", "TGB103");
    let account = elsewhere.replace("eu-west-1", "us-west-2");
    says(reason("account", &account, json!({}), group), "NotAllowed", "TGB104");
    let gone = untagged.replace("/frozen-0/", "/gone/");
    says(reason("gone", &gone, json!({}), group), "TargetGroupNotFound", "TGB110");
    let instance = space.target_group("HTTP", 81, "instance").unwrap();
    tag(&instance);
    let as_ip = json!({"targetGroup": {"arn": instance, "targetType": "ip"}});
    says(reason("type", &instance, as_ip, group), "TargetTypeMismatch", "TGB111");
    let other = space.target_group("HTTP", 82, "instance").unwrap();
    tag(&other);
    says(reason("cluster-ip", &other, json!({}), "BackendResolved"), "UnsupportedServiceType", "TGB205");
    let udp = space.target_group("UDP", 83, "ip").unwrap();
    tag(&udp);
    let tcp = json!({"serviceRef": {"name": "web", "port": 80}});
    says(reason("udp", &udp, tcp, "BackendResolved"), "PortNotFound", "TGB209");
    let port = json!({"serviceRef": {"name": "web", "port": 81}});
    let fine = space.target_group("HTTP", 84, "ip").unwrap();
    tag(&fine);
    says(reason("port", &fine, port, "BackendResolved"), "PortNotFound", "it has 80 (http)");
    assert_eq!(space.count("RegisterTargets") + space.count("DeregisterTargets"), 0);
}

#[test]
fn targets_of_another_account_are_registered_with_a_role() {
    let space = prepare("account").controller("--assume-role-allow=arn:aws:iam::*:role/tgb").start().unwrap();
    bypass_webhook(&space);
    let server = space.server().unwrap();
    let (theirs, role) = ("900000000077", "arn:aws:iam::900000000077:role/tgb");
    server.seed(theirs, "us-west-2", |aws| {
        let vpc = "vpc-0a00000000000077f".to_owned();
        aws.seed_cluster(&awsim::Cluster { vpc, pod_cidr: None, ..awsim::Cluster::default() });
    });
    server.add_role(Role {
        arn: role.to_owned(),
        trusts: vec!["*".to_owned()],
        external_id: Some("a-secret-id".to_owned()),
        max_duration: 0,
    });
    let parameters = [
        ("Name", "theirs"),
        ("Protocol", "HTTP"),
        ("Port", "80"),
        ("TargetType", "ip"),
        ("VpcId", "vpc-0a00000000000077f"),
    ];
    let made = server
        .call((theirs, tgb_e2e::USER), "us-west-2", Service::Elb, "CreateTargetGroup", &parameters)
        .unwrap();
    let arn = made.split("<TargetGroupArn>").nth(1).unwrap().split('<').next().unwrap().to_owned();
    space.deploy("web", 2).unwrap();
    let spec =
        json!({"targetGroup": {"arn": arn, "assumeRole": {"roleARN": role, "externalID": "a-secret-id"}}});
    space.bind("web", &arn, &spec).unwrap();
    until(&space, "Ready", "True", "Reconciled");
    let pods = space.pods("web", 8080).unwrap();
    let there = eventually(SOON, || {
        let there = server.targets(theirs, "us-west-2", &arn);
        let all = there.iter().map(|t| format!("{}:{}", t.id, t.port)).collect::<BTreeSet<_>>();
        if all == pods { Ok(there) } else { Err(format!("{all:?}, not {pods:?}")) }
    })
    .unwrap();
    assert!(there.iter().all(|target| target.zone.as_deref() == Some("all")), "{there:?}");
    assert!(!space.controller().log().contains("a-secret-id"), "the external id is logged");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert!(server.targets(theirs, "us-west-2", &arn).is_empty());
}

// ---- what stays ----

#[test]
fn a_service_that_is_gone_for_a_moment_costs_no_target() {
    let space = space("blink");
    let arn = bound(&space, 2);
    let pods = space.pods("web", 8080).unwrap();
    let service = space.kubectl("get service web -o json").json().unwrap();
    space.kubectl("delete service web").ok().unwrap();
    let message = until(&space, "BackendResolved", "False", "ServiceNotFound");
    assert!(message.contains("blink/web"), "{message}");
    assert!(until_event(&space, "BackendNotFound").contains("ServiceNotFound"));
    stays("targets that run outlive their Service", || space.targets(&arn).unwrap() == pods);
    let mut again = service;
    for field in ["resourceVersion", "uid", "creationTimestamp"] {
        again["metadata"].as_object_mut().unwrap().remove(field);
    }
    space.apply(&again).ok().unwrap();
    until(&space, "Ready", "True", "Reconciled");
    assert_eq!((space.targets(&arn).unwrap(), space.count("DeregisterTargets")), (pods, 0));
}

#[test]
fn a_service_that_stays_away_loses_its_targets_after_the_grace() {
    let space = prepare("away").controller("--missing-backend-grace=3s").start().unwrap();
    let arn = bound(&space, 2);
    space.kubectl("delete service web").ok().unwrap();
    until(&space, "BackendResolved", "False", "ServiceNotFound");
    space.until_targets(&arn, &BTreeSet::new()).unwrap();
    assert_eq!(space.pods("web", 8080).unwrap().len(), 2);
}

#[test]
fn the_last_targets_stay_while_nothing_is_ready_if_the_user_says_so() {
    let space = space("last");
    let arn = bound(&space, 1);
    let pods = space.pods("web", 8080).unwrap();
    annotate(&space, "tgb web", "elbv2.k8s.aws/when-none-ready=keep");
    annotate(&space, "pods --all", "tgb.e2e/unready=true");
    until(&space, "TargetsRegistered", "False", "BackendUnready");
    until_message(&space, "TargetsRegistered", "the last stay: 1 target");
    assert_eq!(space.targets(&arn).unwrap(), pods);
    // what runs no more goes all the same
    space.kubectl("delete pods --all").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    annotate(&space, "pods --all", "tgb.e2e/unready=true");
    until(&space, "TargetsRegistered", "False", "BackendUnready");
    annotate(&space, "tgb web", "elbv2.k8s.aws/when-none-ready=deregister");
    space.until_targets(&arn, &BTreeSet::new()).unwrap();
    until_message(&space, "TargetsRegistered", "none is ready of 1 endpoint");
    annotate(&space, "pods --all", "tgb.e2e/unready=false");
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "Ready", "True", "Reconciled");
}

#[test]
fn healthy_targets_that_run_wait_for_healthy_successors() {
    let space = prepare("swap").controller("--health-poll=1s").start().unwrap();
    let arn = bound(&space, 2);
    let old = space.pods("web", 8080).unwrap();
    let healthy = |wanted: &BTreeSet<String>| -> Result<(), String> {
        let there = space.health(&arn)?;
        let all = wanted
            .iter()
            .all(|key| there.iter().any(|t| format!("{}:{}", t.id, t.port) == *key && t.state == "healthy"));
        if all { Ok(()) } else { Err(format!("{there:?}")) }
    };
    eventually(SOON, || healthy(&old)).unwrap();
    space.deploy("green", 2).unwrap();
    let new = space.pods("green", 8080).unwrap();
    // they stay initial
    registration_takes(&space, 600_000);
    space.bind("web", &arn, &json!({"serviceRef": {"name": "green"}})).unwrap();
    let both: BTreeSet<String> = old.union(&new).cloned().collect();
    space.until_targets(&arn, &both).unwrap();
    stays("the healthy ones stay while the new ones are not healthy", || {
        space.targets(&arn).unwrap() == both
    });
    space.advance(Duration::from_secs(700)).unwrap();
    space.until_targets(&arn, &new).unwrap();
}

// ---- limits, refusals, fights ----

#[test]
fn as_many_targets_as_allowed_are_registered_and_the_rest_is_reported() {
    let space = prepare("limit").controller("--max-targets-per-target-group=2").start().unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 3).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let message = until(&space, "TargetsRegistered", "False", "TargetLimitReached");
    assert!(message.contains("1 target more than --max-targets-per-target-group"), "{message}");
    assert_eq!(space.targets(&arn).unwrap().len(), 2);
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    until(&space, "Ready", "True", "Reconciled");
}

#[test]
fn where_aws_has_no_room_unwanted_targets_go_first() {
    let space = prepare("full").controller("--health-poll=1s").start().unwrap();
    space.seed(|aws| aws.quotas.targets_per_group = 3).unwrap();
    let arn = bound(&space, 3);
    eventually(SOON, || {
        let there = space.health(&arn)?;
        if there.iter().all(|target| target.state == "healthy") { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .unwrap();
    space.attribute(&arn, "deregistration_delay.timeout_seconds", "0").unwrap();
    space.deploy("green", 5).unwrap();
    until_endpoints(&space, "green", 5);
    space.bind("web", &arn, &json!({"serviceRef": {"name": "green"}})).unwrap();
    until(&space, "TargetsRegistered", "False", "TargetLimitReached");
    until_message(&space, "TargetsRegistered", "no room for 2 targets");
    let green = space.pods("green", 8080).unwrap();
    let there = space.targets(&arn).unwrap();
    assert!(there.len() == 3 && there.is_subset(&green), "{there:?}");
    space.seed(|aws| aws.quotas.targets_per_group = 10).unwrap();
    space.until_pods_are_targets(&arn, "green", 5).unwrap();
}

#[test]
fn a_controller_that_takes_our_targets_away_is_not_fought() {
    let space = prepare("fight").controller("--health-poll=1s").start().unwrap();
    let arn = bound(&space, 1);
    let pod = space.pods("web", 8080).unwrap().first().unwrap().clone();
    for registrations in 1..=3 {
        eventually(SOON, || match space.count("RegisterTargets") {
            n if n == registrations => Ok(()),
            n => Err(format!("registered {n} times")),
        })
        .unwrap();
        // a read right after the write might just lag behind
        let looks = space.count("DescribeTargetHealth") + 7;
        eventually(SOON, || match space.count("DescribeTargetHealth") {
            n if n >= looks => Ok(()),
            n => Err(format!("{n} looks")),
        })
        .unwrap();
        space.change_target("DeregisterTargets", &arn, &pod).unwrap();
    }
    until(&space, "TargetsRegistered", "False", "TargetsRemovedByOthers");
    until_event(&space, "TargetsRemovedByOthers");
    let before = space.count("RegisterTargets");
    stays("nothing is registered for a minute", || space.count("RegisterTargets") == before);
}

// ---- a person says so ----

#[test]
fn a_paused_binding_says_what_it_would_do_and_does_it_afterwards() {
    let space = space("paused");
    let arn = bound(&space, 1);
    annotate(&space, "tgb web", "elbv2.k8s.aws/paused=true");
    until(&space, "TargetsRegistered", "False", "Paused");
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    let message = eventually(SOON, || match condition(&space, "web", "TargetsRegistered")? {
        (_, _, message) if message.contains("would register 2 targets: ") => Ok(message),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    assert!(message.starts_with("paused: "), "{message}");
    assert_eq!(space.targets(&arn).unwrap().len(), 1);
    assert_eq!(space.controller().metric("tgb_planned_changes", &["change=\"register\""]).unwrap(), 2.0);
    space.kubectl("annotate tgb web elbv2.k8s.aws/paused-").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
}

#[test]
fn an_observing_controller_writes_nothing_to_aws_and_no_finalizer() {
    let space = prepare("observer").controller("--observe").start().unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 2).unwrap();
    until_endpoints(&space, "web", 2);
    space.bind("web", &arn, &json!({})).unwrap();
    until_message(&space, "TargetsRegistered", "--observe: would register 2 targets: ");
    assert!(until_event(&space, "Paused").contains("would register 2 targets"));
    let object = space.kubectl("get tgb web -o json").json().unwrap();
    assert!(object["metadata"]["finalizers"].is_null(), "{object}");
    let writes = ["RegisterTargets", "DeregisterTargets"];
    assert_eq!(writes.map(|action| space.count(action)), [0, 0]);
}

#[test]
fn a_binding_with_on_delete_retain_leaves_its_targets() {
    let space = space("retain");
    let arn = bound(&space, 2);
    annotate(&space, "tgb web", "elbv2.k8s.aws/on-delete=retain");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), space.pods("web", 8080).unwrap());
}

#[test]
fn a_clean_up_that_fails_says_why_and_can_be_given_up() {
    let space = space("stuck");
    let arn = bound(&space, 1);
    space.fault(Fault::new(Effect::Deny).action("DeregisterTargets")).unwrap();
    space.kubectl("delete tgb web --wait=false").ok().unwrap();
    let message = until(&space, "CleanupFailed", "True", "CleanupFailed");
    assert!(message.contains("DeregisterTargets") && message.contains("not authorized"), "{message}");
    assert_eq!(condition(&space, "web", "Ready").unwrap().1, "CleanupFailed");
    assert_eq!(condition(&space, "web", "TargetGroupResolved").unwrap().0, "True");
    assert!(until_event(&space, "CleanupFailed").contains("DeregisterTargets"));
    annotate(&space, "tgb web", "elbv2.k8s.aws/release=true");
    space.kubectl("wait --for=delete tgb/web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap().len(), 1);
}

#[test]
fn a_clean_up_ends_at_its_deadline_and_at_once_where_the_target_group_is_gone() {
    let space = prepare("deadline").controller("--cleanup-deadline=3s").start().unwrap();
    bound(&space, 1);
    space.fault(Fault::new(Effect::Deny).action("DeregisterTargets")).unwrap();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    space.clear_faults().unwrap();
    let gone = space.target_group("HTTP", 81, "ip").unwrap();
    space.bind("gone", &gone, &json!({"serviceRef": {"name": "web"}})).unwrap();
    space.until_pods_are_targets(&gone, "web", 1).unwrap();
    space.call("DeleteTargetGroup", &[("TargetGroupArn", &gone)]).unwrap();
    space.kubectl("delete tgb gone --timeout=60s").ok().unwrap();
}

// ---- AWS has a bad day ----

#[test]
fn an_outage_shows_in_the_status_and_is_over_when_it_is() {
    let space = space("outage");
    let arn = bound(&space, 1);
    space.fault(Fault::new(Effect::Unavailable)).unwrap();
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    until(&space, "TargetsRegistered", "False", "RegistrationFailed");
    let other = space.target_group("HTTP", 81, "ip");
    space.clear_faults().unwrap();
    drop(other);
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    until(&space, "Ready", "True", "Reconciled");
}

#[test]
fn a_permission_that_is_missing_is_named() {
    let space = space("denied");
    bypass_webhook(&space);
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    space.fault(Fault::new(Effect::Deny).action("DescribeTargetGroups")).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let message = until(&space, "TargetGroupResolved", "False", "AccessDenied");
    assert!(message.contains("elasticloadbalancing:DescribeTargetGroups"), "{message}");
    assert_eq!(condition(&space, "web", "Stalled").unwrap().1, "AccessDenied");
    until_event(&space, "ReconcileFailed");
    space.clear_faults().unwrap();
    space.fault(Fault::new(Effect::Unavailable).action("DescribeTargetGroups")).unwrap();
    until(&space, "TargetGroupResolved", "False", "AwsUnavailable");
    space.clear_faults().unwrap();
    until(&space, "Ready", "True", "Reconciled");
    space.kubectl("wait --for=condition=Ready tgb/web --timeout=60s").ok().unwrap();
}

#[test]
fn a_binding_says_pending_while_its_first_pass_takes_long() {
    let space = space("pending");
    bypass_webhook(&space);
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    space.fault(Fault::new(Effect::Latency { ms: 5_000 }).action("DescribeTargetGroups")).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    until(&space, "Ready", "Unknown", "Pending");
    let object = space.kubectl("get tgb web -o json").json().unwrap();
    assert!(object["status"]["observedGeneration"].is_null(), "{object}");
    until(&space, "Ready", "True", "Reconciled");
}

// ---- readiness gates ----

#[test]
fn a_gate_opens_within_two_seconds_of_awss_word_and_pods_without_one_are_named() {
    let space = prepare("gated").with_readiness_gates().start().unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap(); // before the binding: no gate
    space.bind("web", &arn, &json!({})).unwrap();
    let message = eventually(SOON, || match condition(&space, "web", "TargetsRegistered")? {
        (_, _, message) if message.contains("1 pod without readiness gate") => Ok(message),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    assert!(message.starts_with("1 of 1"), "{message}");
    assert!(until_event(&space, "ReadinessGateMissing").contains("web-"));
    registration_takes(&space, 4_000);
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    let ready = || -> Result<bool, String> {
        let line = "get deployment web -o jsonpath={.status.readyReplicas}";
        Ok(space.kubectl(line).ok()? == "2")
    };
    let healthy =
        || space.health(&arn).map(|all| all.iter().filter(|target| target.state == "healthy").count());
    eventually(SOON, || match healthy()? {
        2 => Ok(()),
        n if ready()? => panic!("ready with {n} healthy targets"),
        n => Err(format!("{n} healthy")),
    })
    .unwrap();
    let since = Instant::now();
    eventually(SOON, || if ready()? { Ok(()) } else { Err("not ready".to_owned()) }).unwrap();
    let took = since.elapsed();
    // Kubernetes' own part, on a busy machine, included
    assert!(took < Duration::from_secs(4), "{took:?}");
    // the gate's metric is there
    assert!(space.controller().metric("tgb_readiness_gate_seconds_count", &[]).unwrap() >= 1.0);
}

#[test]
fn gates_open_where_no_load_balancer_is_and_when_the_binding_goes_or_never_was() {
    let space =
        prepare("open").with_readiness_gates().controller("--orphaned-gate-grace=3s").start().unwrap();
    let gate = |name: &str| json!([{"conditionType": format!("target-health.elbv2.k8s.aws/{name}")}]);
    let pod = |name: &str, gates: Value| {
        json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "other"}},
            "spec": {"readinessGates": gates, "containers": [{"name": "web", "image": "web"}]},
        })
    };
    let state = |pod: &str, binding: &str| -> Result<(String, String, String), String> {
        let object = space.kubectl(&format!("get pod {pod} -o json")).json()?;
        let kind = format!("target-health.elbv2.k8s.aws/{binding}");
        let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let found =
            all.iter().find(|c| c["type"] == kind.as_str()).ok_or_else(|| format!("no {kind}: {object}"))?;
        let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
        Ok((text("status"), text("reason"), text("message")))
    };
    space.apply(&pod("orphan", gate("nobody"))).ok().unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "other"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    space.apply(&pod("unused", gate("web"))).ok().unwrap();
    let until_state = |pod: &str, binding: &str, want: (&str, &str)| {
        eventually(SOON, || match state(pod, binding)? {
            (status, reason, message) if (status.as_str(), reason.as_str()) == want => Ok(message),
            other => Err(format!("{other:?}")),
        })
        .unwrap_or_else(|error| panic!("{pod} {want:?}: {error}"))
    };
    until_state("unused", "web", ("True", "TargetGroupNotInUse"));
    let message = until_state("orphan", "nobody", ("True", "TargetGroupBindingDeleted"));
    assert_eq!(message, "Target Group Binding is deleted");
    // a target that fails keeps its gate shut, with AWS's words, until the binding goes
    space.attach(&arn).unwrap();
    let failing = Probe::Failing { reason: "Target.Timeout".into(), description: "Request timed out".into() };
    space.set_health(&arn, "*", &failing).unwrap();
    space.kubectl("delete pod unused --wait=true").ok().unwrap();
    registration_takes(&space, 600_000);
    space.apply(&pod("failing", gate("web"))).ok().unwrap();
    let message = until_state("failing", "web", ("False", "Elb.RegistrationInProgress"));
    assert_eq!(message, "Target registration is in progress");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    until_state("failing", "web", ("True", "TargetGroupBindingDeleted"));
}

#[test]
fn a_rolling_update_never_has_fewer_healthy_targets_than_its_own_minimum() {
    let space = prepare("rolling").with_readiness_gates().start().unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let deployment = |version: &str| {
        json!({
            "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {
                "replicas": 4, "selector": {"matchLabels": {"app": "web"}},
                "strategy": {"rollingUpdate": {"maxUnavailable": 1, "maxSurge": 1}},
                "template": {
                    "metadata": {"labels": {"app": "web", "version": version}},
                    "spec": {"containers": [{"name": "web", "image": "web"}]},
                },
            },
        })
    };
    space.apply(&deployment("1")).ok().unwrap();
    let healthy = || -> Result<usize, String> {
        Ok(space.health(&arn)?.iter().filter(|target| target.state == "healthy").count())
    };
    eventually(SOON, || match healthy()? {
        4 => Ok(()),
        n => Err(format!("{n} healthy")),
    })
    .unwrap();
    let is_done = || {
        let line = "rollout status deployment web --watch=false";
        space.kubectl(line).ok().map(|text| text.contains("successfully rolled out"))
    };
    eventually(SOON, || if is_done()? { Ok(()) } else { Err("not rolled out".to_owned()) }).unwrap();
    registration_takes(&space, 1_500);
    space.apply(&deployment("2")).ok().unwrap();
    let mut fewest = usize::MAX;
    eventually(Duration::from_secs(120), || {
        fewest = fewest.min(healthy()?);
        if is_done()? { Ok(()) } else { Err("not rolled out".to_owned()) }
    })
    .unwrap();
    assert!(fewest >= 3, "only {fewest} healthy targets");
    space.until_pods_are_targets(&arn, "web", 4).unwrap();
}

// ---- what people read ----

#[test]
fn status_events_and_metrics_tell_what_is_and_are_silent_when_nothing_changes() {
    let space = prepare("told").controller("--health-poll=1s").start().unwrap();
    bound(&space, 2);
    until(&space, "Ready", "True", "Reconciled");
    for kind in ["TargetGroupResolved", "BackendResolved", "TargetsRegistered", "NetworkingReady"] {
        assert_eq!(condition(&space, "web", kind).unwrap().0, "True", "{kind}");
    }
    assert_eq!(condition(&space, "web", "NetworkingReady").unwrap().1, "NotManaged");
    let note = until_event(&space, "Registered");
    assert!(note.starts_with("2 targets: 10.244."), "{note}");
    eventually(SOON, || {
        let line = space.kubectl("get tgb web").ok()?;
        let row: Vec<&str> = line.lines().last().unwrap_or_default().split_whitespace().collect();
        if row.get(..6) == Some(&["web", "web", "80", "ip", "True", "2/2"]) { Ok(()) } else { Err(line) }
    })
    .unwrap();
    let version = || space.kubectl("get tgb web -o jsonpath={.metadata.resourceVersion}").ok().unwrap();
    let (before, told) = (version(), events(&space, "web").len());
    let looks = space.count("DescribeTargetHealth");
    eventually(
        SOON,
        || if space.count("DescribeTargetHealth") > looks + 2 { Ok(()) } else { Err("no look") },
    )
    .unwrap();
    assert_eq!((version(), events(&space, "web").len()), (before, told));
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    eventually(SOON, || match space.controller().metric("tgb_targets", &["state=\"healthy\""])? {
        3.0 => Ok(()),
        other => Err(format!("{other} healthy")),
    })
    .unwrap();
    // observedGeneration follows also where nothing else changes
    let patch = json!({"spec": {"serviceRef": {"port": "http"}}}).to_string();
    space.kubectl_with(&["patch", "tgb", "web", "--type=merge", "-p", &patch], "").ok().unwrap();
    eventually(SOON, || {
        let object = space.kubectl("get tgb web -o json").json()?;
        let (now, seen) = (&object["metadata"]["generation"], &object["status"]["observedGeneration"]);
        if now == seen { Ok(()) } else { Err(format!("{seen} of {now}")) }
    })
    .unwrap();
    let text = get(space.controller().http(), "/metrics").unwrap();
    for line in [
        "tgb_leader 1",
        "tgb_targets{state=\"healthy\"} 3",
        "tgb_bindings{reason=\"Reconciled\"} 1",
        "tgb_target_changes_total{change=\"registered\"} 3",
        "tgb_cache_age_seconds{cache=\"pods\"} 0",
        "tgb_queue_depth 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let registered = space.controller().metric("tgb_endpoint_to_register_seconds_count", &[]).unwrap();
    assert!(
        registered >= 1.0 && text.contains("tgb_reconcile_total{result=\"ok\",reason=\"Reconciled\"}"),
        "{text}"
    );
}
