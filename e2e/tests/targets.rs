//! What the controller does about targets, shown from the outside: each test provokes a situation and reads the target
//! group, the status and the events, as an operator would.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use awsim::{Call, Effect, Fault, Probe, Role, Service};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::Write as _;
use std::process::Stdio;
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

/// Waits until `Ready` of a binding has this reason; gives its message.
fn until_reason(space: &Space<'_>, binding: &str, want: &str) -> String {
    eventually(SOON, || match condition(space, binding, "Ready")? {
        (_, reason, message) if reason == want => Ok(message),
        other => Err(format!("{other:?}")),
    })
    .unwrap_or_else(|error| panic!("{binding} {want}: {error}"))
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

/// Waits until AWS was asked at least so often.
fn until_calls(space: &Space<'_>, action: &str, calls: usize) {
    eventually(SOON, || match space.count(action) {
        n if n >= calls => Ok(()),
        n => Err(format!("{action} {n} times, not {calls}")),
    })
    .unwrap();
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

/// A node of a test's own, which others don't count: it is never Ready, or is excluded from load balancers.
fn own_node(space: &Space<'_>, name: &str, labels: Value, provider: &str, pods: &str) {
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name, "labels": labels, "annotations": {"tgb.e2e/ip": "192.168.9.9", "tgb.e2e/down": "true"},
        },
        "spec": {"providerID": provider, "podCIDR": pods, "unschedulable": true},
    });
    space.apply(&node).ok().unwrap();
}

/// Says of a node that nobody has heard of it, or that it is not ready.
fn node_ready(space: &Space<'_>, name: &str, status: &str) {
    let now = "2026-01-01T00:00:00Z";
    let condition = json!({
        "type": "Ready", "status": status, "reason": "Scenario", "message": "a scenario says so",
        "lastHeartbeatTime": now, "lastTransitionTime": now,
    });
    let patch = json!({"status": {"conditions": [condition]}}).to_string();
    space.kubectl_with(&["patch", "node", name, "--subresource=status", "-p", &patch], "").ok().unwrap();
}

/// What Argo CD makes of a binding by our script, in a real Lua.
fn argo(space: &Space<'_>, binding: &str) -> Result<(String, String), String> {
    const RUN: &str = "import json, sys
from lupa import LuaRuntime
lua = LuaRuntime()
lua.globals().obj = lua.table_from(json.loads(sys.stdin.read()), recursive=True)
health = lua.execute(open(sys.argv[1]).read())
print(health.status + '/' + health.message)
";
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/argocd-health.lua");
    let object = space.kubectl(&format!("get tgb {binding} -o json")).ok()?;
    let python = space.cluster().programs().python("python");
    let mut command = std::process::Command::new(python);
    command.args(["-c", RUN, script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let said = |error: std::io::Error| format!("python: {error}");
    let mut child = command.spawn().map_err(said)?;
    child.stdin.take().unwrap().write_all(object.as_bytes()).map_err(said)?;
    let output = child.wait_with_output().map_err(said)?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let (status, message) =
        text.split_once('/').ok_or_else(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok((status.to_owned(), message.to_owned()))
}

/// Waits until Argo CD shows this health; gives its message.
fn until_argo(space: &Space<'_>, binding: &str, want: &str) -> String {
    eventually(SOON, || match argo(space, binding)? {
        (status, message) if status == want => Ok(message),
        other => Err(format!("{other:?}")),
    })
    .unwrap_or_else(|error| panic!("Argo CD, {binding}, {want}: {error}"))
}

// ---- calls ----

/// The ELBv2 calls up to the first of this action. Looks at what it did may follow by now.
fn up_to<'a>(calls: &'a [Call], action: &str) -> Vec<&'a str> {
    let mut all = elb(calls);
    all.truncate(all.iter().position(|found| *found == action).map_or(all.len(), |at| at + 1));
    all
}

#[test]
fn three_calls_register_a_binding_and_one_each_change_of_endpoints() {
    // No look that nothing calls for comes in between.
    let space = prepare("calls").controller("--health-poll=10m").start().unwrap();
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
    let register = "RegisterTargets";
    assert_eq!(up_to(&calls, register), ["DescribeTargetGroups", "DescribeTargetHealth", register]);
    // New targets are looked at once more, and then no more.
    until_calls(&space, "DescribeTargetHealth", 2);
    for (replicas, action) in [(3, register), (2, "DeregisterTargets")] {
        let before = space.calls().len();
        space.kubectl(&format!("scale deployment web --replicas={replicas}")).ok().unwrap();
        space.until_pods_are_targets(&arn, "web", replicas).unwrap();
        let calls = space.calls().split_off(before);
        assert_eq!(up_to(&calls, action), [action]);
        until_calls(&space, "DescribeTargetHealth", 3);
    }
    assert_eq!((space.count(register), space.count("DeregisterTargets")), (2, 1));
}

#[test]
fn at_a_start_what_one_call_can_describe_is_not_asked_for_in_several() {
    const COUNT: usize = 25;
    let space = space("together");
    space.deploy("web", 1).unwrap();
    let arns: Vec<String> = (0..COUNT).map(|_| space.target_group("HTTP", 80, "ip").unwrap()).collect();
    let bindings: Vec<Value> = (arns.iter().enumerate())
        .map(|(n, arn)| {
            space.binding(&format!("web-{n}"), arn, &json!({"serviceRef": {"name": "web", "port": 80}}))
        })
        .collect();
    space.apply(&json!({"apiVersion": "v1", "kind": "List", "items": bindings})).ok().unwrap();
    let ready = |want: usize| {
        eventually(SOON, || {
            let path = "jsonpath={.items[*].status.conditions[?(@.type==\"Ready\")].reason}";
            let reasons = space.kubectl(&format!("get tgb -o {path}")).ok()?;
            match reasons.split(' ').filter(|reason| *reason == "Reconciled").count() {
                n if n == want => Ok(()),
                n => Err(format!("{n} are ready: {reasons}")),
            }
        })
        .unwrap();
    };
    ready(COUNT);
    let controllers = |action: &str, before: usize| {
        let calls = space.calls().split_off(before);
        calls.iter().filter(|call| call.caller.ends_with("/CONTROLLER") && call.action == action).count()
    };
    let restart = || {
        space.controller().stop().unwrap();
        let before = space.calls().len();
        // So long that all have asked before the first is answered.
        space
            .fault(Fault::new(Effect::Latency { ms: 3_000 }).action("DescribeTargetGroups").times(1))
            .unwrap();
        space.controller().restart().unwrap();
        before
    };
    let before = restart();
    eventually(SOON, || match controllers("DescribeTargetHealth", before) {
        n if n >= COUNT => Ok(()),
        n => Err(format!("{n} looks at health")),
    })
    .unwrap();
    // The first alone, then as many as AWS allows.
    assert_eq!(controllers("DescribeTargetGroups", before), 3);
    // One that is gone fails nobody else.
    space.call("DeleteTargetGroup", &[("TargetGroupArn", &arns[7])]).unwrap();
    restart();
    until_reason(&space, "web-7", "TargetGroupNotFound");
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    for (n, arn) in arns.iter().enumerate().filter(|(n, _)| *n != 7) {
        space.until_pods_are_targets(arn, "web", 2).unwrap_or_else(|error| panic!("web-{n}: {error}"));
    }
    ready(COUNT - 1);
}

#[test]
fn bindings_of_one_target_group_share_what_aws_says_of_its_health() {
    let space =
        prepare("one-look").value("sharedTargets.namespaces={one-look}").with_readiness_gates().start();
    let space = space.unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    registration_takes(&space, 600_000);
    let shared = json!({"targetGroup": {"arn": arn, "sharing": "Shared"}});
    for name in ["a", "b"] {
        space.deploy(name, 0).unwrap();
        space.bind(name, &arn, &shared).unwrap();
        space.kubectl(&format!("scale deployment {name} --replicas=1")).ok().unwrap();
    }
    let both = || -> Result<BTreeSet<String>, String> {
        Ok(space.pods("a", 8080)?.union(&space.pods("b", 8080)?).cloned().collect())
    };
    eventually(SOON, || match (space.targets(&arn)?, both()?) {
        (there, pods) if there == pods && there.len() == 2 => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    // Both wait for their gates, and each looks every second at the earliest.
    let looks = || -> Vec<u64> {
        let calls = space.calls();
        let looks = calls.iter().filter(|call| call.action == "DescribeTargetHealth");
        looks.map(|call| call.real_us).collect()
    };
    let before = looks().len() + 2;
    let times = eventually(SOON, || match looks() {
        times if times.len() > before + 8 => Ok(times[before..].to_vec()),
        times => Err(times.len()),
    })
    .unwrap();
    let count = u64::try_from(times.len() - 1).unwrap();
    let apart = Duration::from_micros((times[times.len() - 1] - times[0]) / count);
    assert!(apart > Duration::from_millis(750), "a look every {apart:?}: {times:?}");
}

#[test]
fn changes_during_a_call_join_the_next_one() {
    const CHANGES: usize = 20;
    let space = prepare("joined").controller("--endpoints-without-pods").start().unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    let ips: Vec<String> = (0..=CHANGES).map(|n| format!("10.1.1.{}", n + 1)).collect();
    let ips: Vec<&str> = ips.iter().map(String::as_str).collect();
    let targets = |ips: &[&str]| ips.iter().map(|ip| format!("{ip}:8080")).collect::<BTreeSet<_>>();
    space.fault(Fault::new(Effect::Latency { ms: 2_000 }).action("RegisterTargets")).unwrap();
    bare_service(&space);
    bare_endpoints(&space, &[&ips[..1]]);
    space.bind("web", &arn, &json!({})).unwrap();
    // They are there before the call is answered.
    space.until_targets(&arn, &targets(&ips[..1])).unwrap();
    let changes: Vec<&[&str]> = (0..CHANGES).map(|n| &ips[..n + 2]).collect();
    bare_endpoints(&space, &changes);
    space.until_targets(&arn, &targets(&ips)).unwrap();
    let calls = space.count("RegisterTargets");
    assert!(calls <= CHANGES / 2, "{calls} calls for {CHANGES} changes");
}

#[test]
fn changes_that_come_while_a_call_waits_for_its_turn_go_out_with_it() {
    let space = prepare("turns")
        .controller("--endpoints-without-pods")
        .controller("--aws-limit=elb-targets=1/0.05")
        .start()
        .unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    let ips = ["10.1.1.1", "10.1.1.2", "10.1.1.3", "10.1.1.4"];
    let targets = |ips: &[&str]| ips.iter().map(|ip| format!("{ip}:8080")).collect::<BTreeSet<_>>();
    bare_service(&space);
    bare_endpoints(&space, &[&ips[..1]]);
    space.bind("web", &arn, &json!({})).unwrap();
    space.until_targets(&arn, &targets(&ips[..1])).unwrap();
    // The next call goes out twenty seconds later, and knows of all that came until then.
    bare_endpoints(&space, &[&ips[..2], &ips[1..]]);
    space.until_targets(&arn, &targets(&ips[1..])).unwrap();
    assert_eq!((space.count("RegisterTargets"), space.count("DeregisterTargets")), (2, 1));
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
fn an_ipv6_target_group_gets_the_pods_ipv6_addresses_and_their_security_group_ipv6_rules() {
    let space = space("six");
    let arn = space.target_group_with("HTTP", 80, "ip", &[("IpAddressType", "ipv6")]).unwrap();
    let group = space.security_group("pods", &[]).unwrap();
    let (vpc, subnet) = (space.aws().lab().vpc.clone(), space.aws().lab().subnets[0].clone());
    let eni = space
        .seed(|aws| {
            let id = aws.new_id("eni");
            let groups = vec![group.clone()];
            aws.enis.insert(
                id.clone(),
                awsim::Eni { id: id.clone(), vpc, subnet, groups, ..awsim::Eni::default() },
            );
            id
        })
        .unwrap();
    let interface = json!([{"eniId": eni, "ipv6Addr": "fd00::7"}]).to_string();
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "labels": {"app": "web"}, "annotations": {"vpc.amazonaws.com/pod-eni": interface}},
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
    let from = json!([{"ipBlock": {"cidr": "2001:db8::/32"}}]);
    let networking = json!({"networking": {"ingress": [{"from": from, "ports": [{"port": 8080}]}]}});
    space.bind("web", &arn, &networking).unwrap();
    space.until_targets(&arn, &BTreeSet::from(["fd00::7:8080".to_owned()])).unwrap();
    until(&space, "NetworkingReady", "True", "Authorized");
    let rules = || -> Vec<String> {
        let rules = space.rules(&group).unwrap();
        rules
            .iter()
            .map(|rule| format!("{} {}-{} {:?}", rule.protocol, rule.from, rule.to, rule.source))
            .collect()
    };
    assert_eq!(rules(), ["tcp 8080-8080 Ipv6(2001:db8::/32)"]);
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(rules(), Vec::<String>::new());
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
    annotate(&space, "tgb web", "elbv2.k8s.aws/paused=true");
    until(&space, "TargetsRegistered", "False", "Paused");
    space
        .seed(|aws| {
            for target in aws.target_groups.get_mut(&arn).unwrap().targets.values_mut() {
                target.quic_server_id = Some("0x00000000000000ff".into());
            }
        })
        .unwrap();
    // What a paused binding would do is looked at as often as anything else.
    until_message(&space, "TargetsRegistered", "paused: would deregister 1 target");
    let passes = || space.controller().metric("tgb_reconcile_total", &[]).unwrap();
    let (before, looks) = (passes(), space.count("DescribeTargetHealth"));
    until_calls(&space, "DescribeTargetHealth", looks + 3);
    let more = passes() - before;
    assert!(more < 50.0, "{more} passes in the time of three polls");
    space.kubectl("annotate tgb web elbv2.k8s.aws/paused-").ok().unwrap();
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
fn where_nobody_has_heard_of_the_nodes_what_runs_there_is_registered_all_the_same() {
    let space = space("fail-open");
    let instance = "i-0f0000000000000f1";
    space
        .seed(|aws| {
            let model = aws.instances.values().next().cloned().unwrap();
            let private_ip = "192.168.9.9".parse().ok();
            let private_dns = String::new();
            aws.add_instance(
                awsim::Instance { id: instance.to_owned(), private_ip, private_dns, ..model },
                Vec::new(),
                Vec::new(),
            );
        })
        .unwrap();
    let provider = format!("aws:///us-west-2a/{instance}");
    own_node(&space, "fail-open", json!({"fail-open": "yes"}), &provider, "10.244.40.0/24");
    node_ready(&space, "fail-open", "Unknown");

    // ip: a pod that is not ready, on such a node
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "labels": {"app": "web"}, "annotations": {"tgb.e2e/unready": "true"}},
        "spec": {"nodeName": "fail-open", "containers": [{"name": "web", "image": "web"}]},
    });
    space.apply(&pod).ok().unwrap();
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
    space.kubectl("wait pod web --for=condition=ContainersReady=False --timeout=60s").ok().unwrap();
    until_endpoints(&space, "web", 0);
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "TargetsRegistered", "True", "Registered");

    // instance: all nodes that are selected are such
    let port = space.node_port("web").unwrap();
    let nodes = space.target_group("HTTP", port, "instance").unwrap();
    let selected =
        json!({"serviceRef": {"name": "web"}, "nodeSelector": {"matchLabels": {"fail-open": "yes"}}});
    space.bind("nodes", &nodes, &selected).unwrap();
    let target = BTreeSet::from([format!("{instance}:{port}")]);
    space.until_targets(&nodes, &target).unwrap();

    // One that says that it is not ready is known; the last target stays all the same.
    node_ready(&space, "fail-open", "False");
    until_reason(&space, "nodes", "BackendUnready");
    assert_eq!(space.targets(&nodes).unwrap(), target);
    space.until_targets(&arn, &BTreeSet::new()).unwrap();

    // The operator may say that nothing is registered on a guess.
    node_ready(&space, "fail-open", "Unknown");
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    space.controller().stop().unwrap();
    space.controller().restart_with(&["--endpoints-fail-open=false"]).unwrap();
    space.until_targets(&arn, &BTreeSet::new()).unwrap();
    until_reason(&space, "nodes", "BackendUnready");
    space.kubectl("delete node fail-open").ok().unwrap();
}

/// A Service `web` without selector.
fn bare_service(space: &Space<'_>) {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"ports": [{"port": 80, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
}

/// Its endpoints are these, one after another in the time that one kubectl takes.
fn bare_endpoints(space: &Space<'_>, changes: &[&[&str]]) {
    let slice = |ips: &&[&str]| {
        let endpoints: Vec<Value> = ips.iter().map(|ip| json!({"addresses": [ip]})).collect();
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
        })
    };
    let all: Vec<Value> = changes.iter().map(slice).collect();
    space.apply(&json!({"apiVersion": "v1", "kind": "List", "items": all})).ok().unwrap();
}

#[test]
fn endpoints_without_pods_count_only_if_the_operator_says_so_and_bad_ones_are_named() {
    let space = space("bare-endpoints");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    bare_service(&space);
    bare_endpoints(&space, &[&["10.1.1.1", "10.1.1.2", "8.8.8.8"]]);
    space.bind("web", &arn, &json!({})).unwrap();
    assert!(until_reason(&space, "web", "NoEndpoints").contains("3 endpoints without a pod"));
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
fn a_binding_that_is_gone_before_its_first_target_registers_none() {
    let space = space("gone");
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    until_endpoints(&space, "web", 1);
    // The webhook asks first, then the controller, which has not set its finalizer by then.
    let fault = Fault::new(Effect::Latency { ms: 5000 }).action("DescribeTargetGroups").contains(&arn);
    space.fault(fault.skip(1).times(1)).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    until_calls(&space, "DescribeTargetGroups", 2);
    assert_eq!(space.count("DescribeTargetGroups"), 2);
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.count("RegisterTargets"), 0);
    eventually(SOON, || match space.controller().metric("tgb_reconcile_total", &[])? {
        passes if passes >= 1.0 => Ok(()),
        passes => Err(format!("{passes} passes")),
    })
    .unwrap();
    assert_eq!(space.count("RegisterTargets"), 0);
    assert!(space.targets(&arn).unwrap().is_empty());
}

#[test]
fn somebody_elses_write_in_the_middle_of_a_pass_is_no_failure() {
    let space = space("meanwhile");
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    until_endpoints(&space, "web", 1);
    // What the pass knows of the binding is old by the time that AWS answers.
    let slow = |action: &str| Fault::new(Effect::Latency { ms: 3000 }).action(action).times(1);
    // The webhook asks first.
    space.fault(slow("DescribeTargetGroups").skip(1)).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    until_calls(&space, "DescribeTargetGroups", 2);
    space.kubectl("label tgb web written=1").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "Ready", "True", "Reconciled");

    let looks = space.count("DescribeTargetHealth");
    space.fault(slow("DescribeTargetHealth")).unwrap();
    space.kubectl("delete tgb web --wait=false").ok().unwrap();
    until_calls(&space, "DescribeTargetHealth", looks + 1);
    space.kubectl("label tgb web written=2 --overwrite").ok().unwrap();
    space.kubectl("wait --for=delete tgb/web --timeout=60s").ok().unwrap();
    until_event(&space, "Deregistered");
    let all = events(&space, "web");
    assert!(all.iter().all(|(reason, _)| !reason.ends_with("Failed")), "{all:?}");
}

/// An address that is not this cluster's, as if another one had registered it.
const FOREIGN: &str = "10.9.9.9:80";

fn register_foreign(space: &Space<'_>, arn: &str) {
    let (id, port) = FOREIGN.split_once(':').unwrap();
    let parameters = [
        ("TargetGroupArn", arn),
        ("Targets.member.1.Id", id),
        ("Targets.member.1.Port", port),
        ("Targets.member.1.AvailabilityZone", "all"),
    ];
    space.call("RegisterTargets", &parameters).unwrap();
}

/// The pods of `web` and the foreign target.
fn with_foreign(space: &Space<'_>) -> BTreeSet<String> {
    let mut all = space.pods("web", 8080).unwrap();
    all.insert(FOREIGN.to_owned());
    all
}

#[test]
fn foreign_targets_stay_until_somebody_agrees_that_they_go() {
    let space = prepare("foreign").controller("--health-poll=1s").start().unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    register_foreign(&space, &arn);
    space.deploy("web", 1).unwrap();
    // a preview names them, and is no first contact
    let mut paused = space.binding("web", &arn, &json!({}));
    paused["metadata"]["annotations"] = json!({"elbv2.k8s.aws/paused": "true"});
    space.apply(&paused).ok().unwrap();
    let message = until(&space, "TargetsRegistered", "False", "ForeignTargets");
    assert!(message.starts_with("paused: ") && message.contains(FOREIGN), "{message}");
    assert!(until_event(&space, "ForeignTargets").contains(FOREIGN));
    let contact = || space.kubectl("get tgb web -o json").json().unwrap()["status"]["firstContact"].clone();
    assert_eq!(contact(), Value::Null);
    space.kubectl("annotate tgb web elbv2.k8s.aws/paused-").ok().unwrap();
    until_message(&space, "TargetsRegistered", "left alone");
    space.until_targets(&arn, &with_foreign(&space)).unwrap();
    until_message(&space, "TargetsRegistered", "elbv2.k8s.aws/adopt-targets");
    assert_eq!(contact()["foreignTargets"], json!([FOREIGN]));
    // neither a restart nor a resync makes it forget
    space.controller().stop().unwrap();
    let looks = space.count("DescribeTargetHealth");
    space.controller().restart_with(&["--resync=1s"]).unwrap();
    until_calls(&space, "DescribeTargetHealth", looks + 3);
    assert_eq!(space.targets(&arn).unwrap(), with_foreign(&space));
    annotate(&space, "tgb web", "elbv2.k8s.aws/adopt-targets=true");
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "TargetsRegistered", "True", "Registered");
    assert_eq!(contact()["foreignTargets"], json!([]));
}

#[test]
fn foreign_targets_go_after_the_grace_where_the_operator_sets_one() {
    let space = prepare("grace")
        .controller("--health-poll=1s")
        .controller("--foreign-targets-grace=3s")
        .start()
        .unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    register_foreign(&space, &arn);
    space.deploy("web", 1).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    assert!(until_event(&space, "ForeignTargets").contains("left alone until "));
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "TargetsRegistered", "True", "Registered");
}

/// A namespace of a backup comes into a cluster that it is not of, with finalizer, status and ConfigMap.
#[test]
fn records_of_another_cluster_give_no_right_to_what_it_serves() {
    let space = prepare("restored").value("sharedTargets.namespaces={restored}").start().unwrap();
    space.deploy("web", 1).unwrap();
    let served = || {
        let arn = space.target_group("HTTP", 80, "ip").unwrap();
        register_foreign(&space, &arn);
        arn
    };
    let there = BTreeSet::from([FOREIGN.to_owned()]);
    let restore = |name: &str, arn: &str, sharing: &str, contact: Value| {
        let spec = json!({"targetGroup": {"arn": arn, "sharing": sharing}, "serviceRef": {"name": "web"}});
        let mut object = space.binding(name, arn, &spec);
        object["metadata"]["finalizers"] = json!(["elbv2.k8s.aws/resources"]);
        space.apply(&object).ok().unwrap();
        let mut status = json!({"observedGeneration": 1, "targetGroupARN": arn});
        if !contact.is_null() {
            status["firstContact"] = contact;
        }
        let patch = json!({"status": status}).to_string();
        let args = ["patch", "tgb", name, "--subresource=status", "--type=merge", "-p", &patch];
        space.kubectl_with(&args, "").ok().unwrap();
    };
    let map = |name: &str, annotations: Value| {
        let metadata = json!({"name": format!("aws-lbc-targets-{name}"), "annotations": annotations});
        let object = json!({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"targets": FOREIGN},
        });
        space.apply(&object).ok().unwrap();
    };
    let contact = |arn: &str| json!({"cluster": "other", "bindingUID": "u", "targetGroupARN": arn});
    let marks = json!({"elbv2.k8s.aws/cluster": "other", "elbv2.k8s.aws/binding-uid": "u"});
    space.controller().stop().unwrap();
    // deleted before anybody looked
    let (first, second, third) = (served(), served(), served());
    restore("status", &first, "Exclusive", contact(&first));
    restore("unmarked", &second, "Exclusive", Value::Null);
    restore("map", &third, "Shared", contact(&third));
    map("map", marks.clone());
    for name in ["status", "unmarked", "map"] {
        space.kubectl(&format!("delete tgb {name} --wait=false")).ok().unwrap();
    }
    // looked at, and deleted later; the second map is LBC's, without marks
    let (fourth, fifth, sixth) = (served(), served(), served());
    restore("lives", &fourth, "Exclusive", contact(&fourth));
    restore("shares", &fifth, "Shared", contact(&fifth));
    map("shares", marks);
    restore("of-lbc", &sixth, "Shared", Value::Null);
    map("of-lbc", json!({}));
    space.controller().restart().unwrap();
    for name in ["status", "unmarked", "map"] {
        space.kubectl(&format!("wait --for=delete tgb/{name} --timeout=60s")).ok().unwrap();
    }
    for arn in [&first, &second, &third] {
        assert_eq!(space.targets(arn).unwrap(), there);
    }
    assert!(
        events(&space, "status")
            .iter()
            .any(|(reason, note)| { reason == "CleanupIncomplete" && note.contains("of cluster other") })
    );
    assert!(until_reason(&space, "lives", "ForeignTargets").contains(FOREIGN));
    for name in ["shares", "of-lbc"] {
        until_reason(&space, name, "Reconciled");
        let map = space.kubectl(&format!("get configmap aws-lbc-targets-{name} -o json")).json().unwrap();
        assert_eq!(map["metadata"]["annotations"]["elbv2.k8s.aws/cluster"], "demo", "{map}");
        assert!(!map["data"]["targets"].as_str().unwrap().contains(FOREIGN), "{map}");
    }
    for arn in [&fourth, &fifth, &sixth] {
        space.until_targets(arn, &with_foreign(&space)).unwrap();
    }
    for (name, arn) in [("lives", &fourth), ("shares", &fifth), ("of-lbc", &sixth)] {
        space.kubectl(&format!("delete tgb {name} --timeout=60s")).ok().unwrap();
        assert_eq!(space.targets(arn).unwrap(), there, "{name}");
    }
}

#[test]
fn a_binding_by_name_follows_a_target_group_that_is_made_anew_under_it() {
    let space = space("byname");
    let made = || {
        let vpc = space.aws().lab().vpc.clone();
        let parameters = [
            ("Name", "byname-made"),
            ("Protocol", "HTTP"),
            ("Port", "80"),
            ("TargetType", "ip"),
            ("VpcId", vpc.as_str()),
        ];
        let answer = space.call("CreateTargetGroup", &parameters).unwrap();
        let (_, rest) = answer.split_once("<TargetGroupArn>").unwrap();
        rest.split_once('<').unwrap().0.to_owned()
    };
    let old = made();
    space.deploy("web", 1).unwrap();
    space.bind("web", "", &json!({"targetGroup": {"name": "byname-made"}})).unwrap();
    space.until_pods_are_targets(&old, "web", 1).unwrap();
    space.call("DeleteTargetGroup", &[("TargetGroupArn", &old)]).unwrap();
    let new = made();
    assert_ne!(old, new);
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    space.until_pods_are_targets(&new, "web", 2).unwrap();
    until(&space, "Ready", "True", "Reconciled");
    until_message(&space, "TargetGroupResolved", &new);
    let object = space.kubectl("get tgb web -o json").json().unwrap();
    assert_eq!(
        (&object["spec"]["targetGroup"]["arn"], &object["status"]["targetGroupARN"]),
        (&json!(old), &json!(new))
    );
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert!(space.targets(&new).unwrap().is_empty());
}

#[test]
fn a_shared_binding_without_leave_to_keep_its_config_map_says_what_is_missing_and_goes() {
    let space = space("leaveless");
    bypass_webhook(&space);
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    register_foreign(&space, &arn);
    space.deploy("web", 1).unwrap();
    space.bind("web", &arn, &json!({"targetGroup": {"arn": arn, "sharing": "Shared"}})).unwrap();
    let message = until(&space, "TargetsRegistered", "False", "RegistrationFailed");
    assert!(message.contains("sharedTargets.namespaces") && message.contains("is forbidden"), "{message}");
    assert!(!message.contains("Some(") && !message.contains("ApiError"), "{message}");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), BTreeSet::from([FOREIGN.to_owned()]));
}

/// Everything that an editor of a namespace can do to bindings, in every version, against every flag about tenants.
#[test]
fn an_editor_of_a_namespace_reaches_no_target_group_of_another_team() {
    let flags = [
        "--require-target-group-tag=team=web",
        "--namespace-binding-tag=namespaces",
        "--assume-role-allow=arn:aws:iam::*:role/tenant-*",
    ];
    let prepared = flags.iter().fold(prepare("tenant"), |all, flag| all.controller(flag).webhook(flag));
    let space = prepared.start().unwrap();
    let tagged = |namespaces: &str| {
        let arn = space.target_group("HTTP", 80, "ip").unwrap();
        let tags = [
            ("ResourceArns.member.1", arn.as_str()),
            ("Tags.member.1.Key", "team"),
            ("Tags.member.1.Value", "web"),
            ("Tags.member.2.Key", "namespaces"),
            ("Tags.member.2.Value", namespaces),
        ];
        space.call("AddTags", &tags).unwrap();
        arn
    };
    let victim = tagged("others");
    register_foreign(&space, &victim);
    space.deploy("web", 1).unwrap();
    // As the chart's ClusterRole allows it.
    let role = space.kubectl("get clusterrole tgb-tenant-editor -o json").json().unwrap();
    let bind = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": "editor"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role["metadata"]["name"]},
        "subjects": [{"kind": "User", "apiGroup": "rbac.authorization.k8s.io", "name": "editor"}],
    });
    space.apply(&bind).ok().unwrap();
    let editor = |args: &[&str], stdin: &str| space.kubectl_with(&[&["--as=editor"], args].concat(), stdin);
    let forged = json!({
        "observedGeneration": 1, "targetGroupARN": victim,
        "targets": {"desired": 1, "registered": 1, "healthy": 1, "unhealthy": 0, "draining": 0, "summary": "1/1"},
        "firstContact": {"cluster": "demo", "bindingUID": "u", "targetGroupARN": victim},
    });
    for version in ["v1", "v1beta1", "v1alpha1"] {
        let own = tagged("tenant");
        let kind = format!("targetgroupbindings.{version}.elbv2.k8s.aws");
        let object = |arn: &str, role: Option<&str>| {
            let spec = match (version, role) {
                ("v1", None) => json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": "web"}}),
                ("v1", Some(role)) => json!({
                    "targetGroup": {"arn": arn, "assumeRole": {"roleARN": role}}, "serviceRef": {"name": "web"},
                }),
                (_, None) => json!({"targetGroupARN": arn, "serviceRef": {"name": "web", "port": 80}}),
                (_, Some(role)) => json!({
                    "targetGroupARN": arn, "iamRoleArnToAssume": role, "serviceRef": {"name": "web", "port": 80},
                }),
            };
            let data = json!({"status": forged, "for": "u"}).to_string();
            json!({
                "apiVersion": format!("elbv2.k8s.aws/{version}"), "kind": "TargetGroupBinding",
                "metadata": {
                    "name": "web", "finalizers": ["elbv2.k8s.aws/resources"],
                    "annotations": {
                        "elbv2.k8s.aws/conversion-data": data, "elbv2.k8s.aws/adopt-targets": "true",
                    },
                },
                "spec": spec, "status": forged,
            })
        };
        // create: neither the group of others nor a role that is not allowed
        editor(&["create", "-f", "-"], &object(&victim, None).to_string()).refused().unwrap();
        let role = object(&own, Some("arn:aws:iam::999999999999:role/admin")).to_string();
        editor(&["create", "-f", "-"], &role).refused().unwrap();
        editor(&["create", "-f", "-"], &object(&own, None).to_string()).ok().unwrap();
        space.until_pods_are_targets(&own, "web", 1).unwrap();
        // update and patch, with status and annotations in the body; the status itself is not theirs
        let live = editor(&["get", &kind, "web", "-o", "json"], "").json().unwrap();
        let mut replaced = live.clone();
        replaced["status"] = forged.clone();
        replaced["metadata"]["annotations"] = object(&own, None)["metadata"]["annotations"].clone();
        editor(&["replace", "-f", "-"], &replaced.to_string()).ok().unwrap();
        let patch = json!({"status": forged, "metadata": {"annotations": {"a": "b"}}}).to_string();
        editor(&["patch", &kind, "web", "--type=merge", "-p", &patch], "").ok().unwrap();
        let patch = json!({"status": forged}).to_string();
        let of_status = ["patch", &kind, "web", "--subresource=status", "--type=merge", "-p", &patch];
        editor(&of_status, "").refused().unwrap();
        let arn = if version == "v1" {
            json!({"targetGroup": {"arn": victim}})
        } else {
            json!({"targetGroupARN": victim})
        };
        let patch = json!({"spec": arn}).to_string();
        editor(&["patch", &kind, "web", "--type=merge", "-p", &patch], "").refused().unwrap();
        let status = space.kubectl("get tgb web -o json").json().unwrap()["status"].clone();
        assert_eq!(status["targetGroupARN"], json!(own), "{version}");
        editor(&["delete", &kind, "web", "--timeout=60s"], "").ok().unwrap();
        assert!(space.targets(&own).unwrap().is_empty(), "{version}");
        assert_eq!(space.targets(&victim).unwrap(), BTreeSet::from([FOREIGN.to_owned()]), "{version}");
    }
    // Even a status that somebody with more rights forged reaches no group that is closed to the namespace.
    let own = tagged("tenant");
    space.bind("web", &own, &json!({})).unwrap();
    space.until_pods_are_targets(&own, "web", 1).unwrap();
    space.controller().stop().unwrap();
    let uid = space.kubectl("get tgb web -o json").json().unwrap()["metadata"]["uid"].clone();
    let contact = json!({"cluster": "demo", "bindingUID": uid, "targetGroupARN": victim});
    let patch = json!({"status": {"targetGroupARN": victim, "firstContact": contact}}).to_string();
    let args = ["patch", "tgb", "web", "--subresource=status", "--type=merge", "-p", &patch];
    space.kubectl_with(&args, "").ok().unwrap();
    space.kubectl("delete tgb web --wait=false").ok().unwrap();
    space.controller().restart().unwrap();
    space.kubectl("wait --for=delete tgb/web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&victim).unwrap(), BTreeSet::from([FOREIGN.to_owned()]));
    assert!(until_event(&space, "CleanupIncomplete").contains("TGB404"));
    assert_eq!(space.count("AssumeRole"), 0);
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
fn a_binding_that_is_shared_no_more_leaves_no_config_map_also_over_a_restart() {
    let space = prepare("unshared").value("sharedTargets.namespaces={unshared}").start().unwrap();
    let arn = bound(&space, 2);
    let share = |sharing: &str| {
        space.bind("web", &arn, &json!({"targetGroup": {"arn": arn, "sharing": sharing}})).unwrap();
    };
    let maps = || space.kubectl("get configmaps -o name").ok().map(|all| all.contains("aws-lbc-targets-web"));
    let until_tracked = |want: bool| {
        eventually(SOON, || match maps()? {
            there if there == want => Ok(()),
            there => Err(format!("ConfigMap: {there}")),
        })
        .unwrap_or_else(|error| panic!("wanted {want}: {error}"));
    };
    // while the controller looks
    share("Shared");
    until_tracked(true);
    share("Exclusive");
    until_tracked(false);
    // paused: nothing is touched, and nothing is forgotten
    share("Shared");
    until_tracked(true);
    annotate(&space, "tgb web", "elbv2.k8s.aws/paused=true");
    until(&space, "TargetsRegistered", "False", "Paused");
    share("Exclusive");
    eventually(SOON, || {
        let object = space.kubectl("get tgb web -o json").json()?;
        let (now, seen) = (&object["metadata"]["generation"], &object["status"]["observedGeneration"]);
        if now == seen { Ok(()) } else { Err(format!("{seen} of {now}")) }
    })
    .unwrap();
    assert_eq!(maps(), Ok(true));
    space.kubectl("annotate tgb web elbv2.k8s.aws/paused-").ok().unwrap();
    until_tracked(false);
    // while it is away
    share("Shared");
    until_tracked(true);
    until(&space, "Ready", "True", "Reconciled");
    space.controller().stop().unwrap();
    share("Exclusive");
    space.controller().restart().unwrap();
    until_tracked(false);
    until(&space, "Ready", "True", "Reconciled");
    assert_eq!(space.targets(&arn).unwrap(), space.pods("web", 8080).unwrap());
    // and back, where it begins with what is registered
    space.controller().stop().unwrap();
    share("Shared");
    space.controller().restart().unwrap();
    until_tracked(true);
    assert_eq!(space.targets(&arn).unwrap(), space.pods("web", 8080).unwrap());
    until(&space, "Ready", "True", "Reconciled");
    // and deleted meanwhile
    space.controller().stop().unwrap();
    share("Exclusive");
    space.kubectl("delete tgb web --wait=false").ok().unwrap();
    space.controller().restart().unwrap();
    space.kubectl("wait --for=delete tgb/web --timeout=60s").ok().unwrap();
    assert_eq!((maps(), space.targets(&arn)), (Ok(false), Ok(BTreeSet::new())));
    assert_eq!(space.count("RegisterTargets"), 1);
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
    let space = prepare("frozen")
        .controller("--require-target-group-tag=team=web")
        .controller("--namespace-binding-tag=namespaces")
        .start()
        .unwrap();
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
    let tags = |arn: &str, namespaces: &str| {
        let tags = [
            ("ResourceArns.member.1", arn),
            ("Tags.member.1.Key", "team"),
            ("Tags.member.1.Value", "web"),
            ("Tags.member.2.Key", "namespaces"),
            ("Tags.member.2.Value", namespaces),
        ];
        space.call("AddTags", &tags).unwrap();
    };
    let tag = |arn: &str| tags(arn, "frozen");
    let closed = space.target_group("HTTP", 80, "ip").unwrap();
    tags(&closed, "others");
    says(reason("closed", &closed, json!({}), group), "NotAllowed", "TGB404");
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
    // a Service of type LoadBalancer without node ports
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "direct"},
        "spec": {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "selector": {"app": "web"},
            "ports": [{"port": 80, "targetPort": 8080}]},
    });
    space.apply(&service).ok().unwrap();
    let direct = space.target_group("HTTP", 85, "instance").unwrap();
    tag(&direct);
    let of_it = json!({"serviceRef": {"name": "direct"}});
    says(reason("direct", &direct, of_it, "BackendResolved"), "NodePortMissing", "TGB205");
    // what the schema refuses today may be stored since yesterday
    let stored = |name: &str, change: &dyn Fn(&mut Value)| {
        let arn = space.target_group("HTTP", 86, "ip").unwrap();
        space.bind(name, &arn, &json!({"serviceRef": {"name": "web"}})).unwrap();
        until_reason(&space, name, "NotAllowed");
        space
            .cluster()
            .change_stored("frozen", name, |object| change(&mut object["spec"]["targetGroup"]))
            .unwrap();
    };
    stored("nameless", &|group| *group = json!({"targetType": "ip"}));
    assert!(until_reason(&space, "nameless", "InvalidSpec").contains("TGB101"));
    let listener = untagged.replace(":targetgroup/", ":listener/");
    stored("listener", &|group| group["arn"] = json!(listener));
    assert!(until_reason(&space, "listener", "InvalidSpec").contains("TGB102"));
    let role = json!({"roleARN": format!("arn:aws:iam::{}:role/any", space.aws().account())});
    stored("role", &|group| {
        group["targetType"] = json!("instance");
        group["assumeRole"] = role.clone();
    });
    eventually(SOON, || match condition(&space, "role", group)? {
        (_, _, message) if message.contains("TGB401") => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    // only a person can help
    assert!(until_argo(&space, "nameless", "Degraded").contains("InvalidSpec: TGB101"));
    assert_eq!(space.count("AssumeRole"), 0);
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

#[test]
fn a_cluster_in_china_binds_its_own_target_groups_and_no_others() {
    let region = "--aws-region=cn-north-1";
    let space = prepare("china").controller(region).webhook(region).start().unwrap();
    let (server, account) = (space.server().unwrap(), space.aws().account());
    server.seed(account, "cn-north-1", |aws| aws.seed_cluster(&awsim::Cluster::default()));
    let vpc = awsim::Cluster::default().vpc;
    let parameters =
        [("Name", "web"), ("Protocol", "HTTP"), ("Port", "80"), ("TargetType", "ip"), ("VpcId", &vpc)];
    let made = server
        .call((account, tgb_e2e::USER), "cn-north-1", Service::Elb, "CreateTargetGroup", &parameters)
        .unwrap();
    let arn = made.split("<TargetGroupArn>").nth(1).unwrap().split('<').next().unwrap().to_owned();
    assert!(arn.starts_with("arn:aws-cn:"), "{arn}");
    space.deploy("web", 2).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    let pods = space.pods("web", 8080).unwrap();
    eventually(SOON, || {
        let there = server.targets(account, "cn-north-1", &arn);
        let there: BTreeSet<String> = there.iter().map(|t| format!("{}:{}", t.id, t.port)).collect();
        if there == pods { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .unwrap();
    until(&space, "Ready", "True", "Reconciled");
    // the region alone does not make an ARN of this partition
    let other = arn.replace("arn:aws-cn:", "arn:aws:");
    let said = space.apply(&space.binding("other", &other, &json!({}))).refused().unwrap();
    assert!(said.contains("TGB103"), "{said}");
    bypass_webhook(&space);
    space.bind("other", &other, &json!({"serviceRef": {"name": "web"}})).unwrap();
    assert!(until_reason(&space, "other", "NotAllowed").contains("TGB103"));
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
fn a_new_service_whose_endpoints_are_still_to_come_costs_no_target() {
    let space = prepare("young").controller("--missing-backend-grace=10m").start().unwrap();
    let arn = bound(&space, 2);
    let pods = space.pods("web", 8080).unwrap();
    let mut service = space.kubectl("get service web -o json").json().unwrap();
    for field in ["resourceVersion", "uid", "creationTimestamp"] {
        service["metadata"].as_object_mut().unwrap().remove(field);
    }
    // as a controller of slices that takes its time
    let quota = json!({
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"},
        "spec": {"hard": {"count/endpointslices.discovery.k8s.io": "0"}},
    });
    space.apply(&quota).ok().unwrap();
    space.kubectl("wait resourcequota none --for=jsonpath={.status.hard} --timeout=60s").ok().unwrap();
    space.kubectl("delete service web").ok().unwrap();
    until(&space, "BackendResolved", "False", "ServiceNotFound");
    assert!(until_argo(&space, "web", "Progressing").starts_with("ServiceNotFound: "));
    eventually(SOON, || match space.kubectl("get endpointslices -o name").ok()? {
        left if left.is_empty() => Ok(()),
        left => Err(left),
    })
    .unwrap();
    space.apply(&service).ok().unwrap();
    let message = until(&space, "BackendResolved", "Unknown", "Pending");
    assert!(message.contains("young/web is new: its endpoints are still to come"), "{message}");
    stays("targets that run outlive a Service without slices", || space.targets(&arn).unwrap() == pods);
    space.kubectl("delete resourcequota none").ok().unwrap();
    // whoever makes slices tries again at a change
    let mut n = 0;
    eventually(SOON, || {
        n += 1;
        annotate(&space, "service web", &format!("touched={n}"));
        match condition(&space, "web", "Ready")? {
            (status, ..) if status == "True" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    assert_eq!((space.targets(&arn).unwrap(), space.count("DeregisterTargets")), (pods, 0));
}

#[test]
fn in_a_namespace_that_ends_there_is_no_grace() {
    let space = prepare("ending")
        .namespace("ending-2")
        .controller("--missing-backend-grace=10m")
        .controller("--swap-grace=10m")
        .start()
        .unwrap();
    let there = |line: &[&str], stdin: &str| {
        space.cluster().kubectl_with(&[&["-n", "ending-2"], line].concat(), stdin)
    };
    // Kubernetes takes pods away first, and this one keeps it waiting.
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "web", "labels": {"app": "web"}, "finalizers": ["tgb.e2e/stays"]},
        "spec": {"nodeName": "node-1", "containers": [{"name": "web", "image": "web"}]},
    });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"type": "NodePort", "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    for object in [pod, service] {
        there(&["apply", "-f", "-"], &object.to_string()).ok().unwrap();
    }
    let port =
        there(&["get", "service", "web", "-o", "jsonpath={.spec.ports[0].nodePort}"], "").ok().unwrap();
    let arn = space.served_target_group("HTTP", port.parse().unwrap(), "instance").unwrap();
    there(&["apply", "-f", "-"], &space.binding("web", &arn, &json!({})).to_string()).ok().unwrap();
    let nodes = space.aws().lab().instances.iter().map(|(id, ..)| format!("{id}:{port}")).collect();
    space.until_targets(&arn, &nodes).unwrap();

    space.kubectl("delete namespace ending-2 --wait=false").ok().unwrap();
    eventually(SOON, || {
        match there(&["get", "pod", "web", "-o", "jsonpath={.metadata.deletionTimestamp}"], "").ok()? {
            time if time.is_empty() => Err("the pod is not going yet"),
            _ => Ok(()),
        }
        .map_err(str::to_owned)
    })
    .unwrap();
    let deleted = there(&["get", "tgb", "web", "-o", "jsonpath={.metadata.deletionTimestamp}"], "").ok();
    assert_eq!(deleted, Ok(String::new()), "the binding is to live while the pod stays");
    there(&["delete", "service", "web"], "").ok().unwrap();
    // The nodes run, and would stay for the grace.
    space.until_targets(&arn, &BTreeSet::new()).unwrap();
    let still = there(&["get", "tgb", "web", "-o", "jsonpath={.metadata.deletionTimestamp}"], "").ok();
    assert_eq!(still, Ok(String::new()), "it was the end of the binding, not of its namespace");
    let patch = r#"{"metadata": {"finalizers": null}}"#;
    there(&["patch", "pod", "web", "--type=merge", "-p", patch], "").ok().unwrap();
    space.kubectl("wait --for=delete namespace/ending-2 --timeout=60s").ok().unwrap();
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

/// Waits until AWS says this of every target.
fn until_states(space: &Space<'_>, arn: &str, want: &str) {
    eventually(SOON, || {
        space.advance(Duration::from_millis(200))?;
        let there = space.health(arn)?;
        let all = !there.is_empty() && there.iter().all(|target| target.state == want);
        if all { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .unwrap();
}

/// Counts of a binding's status.
fn counts(space: &Space<'_>, binding: &str) -> Result<Value, String> {
    Ok(space.kubectl(&format!("get tgb {binding} -o json")).json()?["status"]["targets"].clone())
}

#[test]
fn an_unhealthy_target_whose_connections_drain_is_still_registered() {
    let space = prepare("sick")
        .value("sharedTargets.namespaces={sick}")
        .controller("--health-poll=1s")
        .start()
        .unwrap();
    space.deploy("web", 2).unwrap();
    until_endpoints(&space, "web", 2);
    let group = |sharing: &str| {
        let arn = space.served_target_group("TCP", 80, "ip").unwrap();
        let attribute = |key: &str, value: &str| {
            space.attribute(&arn, &format!("target_health_state.unhealthy.{key}"), value).unwrap();
        };
        attribute("connection_termination.enabled", "false");
        attribute("draining_interval_seconds", "360000");
        let name = sharing.to_lowercase();
        let more = json!({"targetGroup": {"arn": arn, "sharing": sharing}, "serviceRef": {"name": "web", "port": 80}});
        space.bind(&name, &arn, &more).unwrap();
        space.until_pods_are_targets(&arn, "web", 2).unwrap();
        (name, arn)
    };
    let groups = ["Exclusive", "Shared"].map(group);
    for (name, arn) in &groups {
        until_states(&space, arn, "healthy");
        let probe =
            Probe::Failing { reason: "Target.Timeout".into(), description: "Request timed out".into() };
        space.set_health(arn, "*", &probe).unwrap();
        until_states(&space, arn, "unhealthy.draining");
        eventually(SOON, || {
            let counts = counts(&space, name)?;
            let right = counts["unhealthy"] == 2 && counts["registered"] == 2 && counts["draining"] == 0;
            if right { Ok(()) } else { Err(counts.to_string()) }
        })
        .unwrap();
    }
    let registrations = space.count("RegisterTargets");
    let looks = space.count("DescribeTargetHealth");
    until_calls(&space, "DescribeTargetHealth", looks + 6);
    assert_eq!(space.count("RegisterTargets"), registrations, "they are not registered again");
    // A pod that ends takes its target with it in either.
    space.kubectl("scale deployment web --replicas=1").ok().unwrap();
    for (_, arn) in &groups {
        space.until_pods_are_targets(arn, "web", 1).unwrap();
    }
    let now = space.pods("web", 8080).unwrap();
    // What is sick is not forgotten.
    let listed: BTreeSet<String> = space
        .kubectl("get configmap aws-lbc-targets-shared -o jsonpath={.data.targets}")
        .ok()
        .unwrap()
        .split(',')
        .map(str::to_owned)
        .collect();
    assert!(now.is_subset(&listed), "{listed:?}, not {now:?}");
    for (name, arn) in &groups {
        space.kubectl(&format!("delete tgb {name} --timeout=60s")).ok().unwrap();
        assert!(space.targets(arn).unwrap().is_empty());
    }
}

#[test]
fn targets_stay_as_they_are_whatever_their_port_is_called() {
    let space = prepare("renames").controller("--health-poll=1s").start().unwrap();
    space.deploy("web", 2).unwrap();
    until_endpoints(&space, "web", 2);
    let by_number = json!({"serviceRef": {"name": "web", "port": 80}});
    let (unused, sick) =
        (space.target_group("HTTP", 80, "ip").unwrap(), space.served_target_group("HTTP", 80, "ip").unwrap());
    for (name, arn) in [("unused", &unused), ("sick", &sick)] {
        space.bind(name, arn, &by_number).unwrap();
        space.until_pods_are_targets(arn, "web", 2).unwrap();
    }
    let probe = Probe::Failing { reason: "Target.Timeout".into(), description: "Request timed out".into() };
    space.set_health(&sick, "*", &probe).unwrap();
    until_states(&space, &sick, "unhealthy");
    until_states(&space, &unused, "unused");
    for (name, target_port) in
        [("main", json!(8080)), ("web", json!(8080)), ("", json!(8080)), ("http", json!(8080))]
    {
        let port = json!({"name": name, "port": 80, "targetPort": target_port, "protocol": "TCP"});
        let patch = json!({"spec": {"ports": [port]}}).to_string();
        space.kubectl_with(&["patch", "service", "web", "--type=merge", "-p", &patch], "").ok().unwrap();
        eventually(SOON, || {
            let line = "get endpointslices -l kubernetes.io/service-name=web -o json";
            let slices = space.kubectl(line).json()?;
            let now = slices["items"][0]["ports"][0]["name"].clone();
            if now == name { Ok(()) } else { Err(now.to_string()) }
        })
        .unwrap();
    }
    // What comes after is there, so that nothing before it is still under way.
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    for arn in [&unused, &sick] {
        space.until_pods_are_targets(arn, "web", 3).unwrap();
    }
    assert_eq!([space.count("RegisterTargets"), space.count("DeregisterTargets")], [4, 0]);
}

#[test]
fn a_binding_that_has_nothing_to_register_says_so_and_scaling_to_zero_is_no_failure() {
    let space = prepare("nothing").controller("--missing-backend-grace=2s").start().unwrap();
    space.deploy("web", 1).unwrap();
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.bind("web", &arn, &json!({"serviceRef": {"name": "web", "port": 80}})).unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    until(&space, "Ready", "True", "Reconciled");
    space.kubectl("scale deployment web --replicas=0").ok().unwrap();
    let message = until(&space, "Ready", "True", "NoMatchingPods");
    assert!(message.contains("Service nothing/web selects no running pod by app=web"), "{message}");
    assert!(until_argo(&space, "web", "Healthy").starts_with("NoMatchingPods"));
    space.kubectl("scale deployment web --replicas=1").ok().unwrap();
    until(&space, "Ready", "True", "Reconciled");

    let service = |name: &str, label: &str, target_port: Value| {
        let ports = json!([{"port": 80, "targetPort": target_port, "nodePort": null}]);
        space
            .apply(&json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
                "spec": {"type": "NodePort", "selector": {"app": label}, "ports": ports},
            }))
            .ok()
            .unwrap();
    };
    service("typo", "wbe", json!(8080));
    service("named", "web", json!("htpp"));
    service("nodes", "web", json!(8080));
    let port = space.node_port("nodes").unwrap();
    for (name, kind, port, more) in [
        ("typo", "ip", 80, json!({})),
        ("named", "ip", 80, json!({})),
        ("nodes", "instance", port, json!({"nodeSelector": {"matchLabels": {"pool": "nosuch"}}})),
    ] {
        let arn = space.target_group("HTTP", port, kind).unwrap();
        let mut spec = json!({"serviceRef": {"name": name, "port": 80}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        space.bind(name, &arn, &spec).unwrap();
    }
    for (name, reason, words) in [
        ("typo", "NoMatchingPods", "selects no running pod by app=wbe"),
        ("named", "NoMatchingPort", "has a TCP port htpp"),
        ("nodes", "NoMatchingNodes", "spec.nodeSelector takes no node"),
    ] {
        eventually(SOON, || match condition(&space, name, "Ready")? {
            (status, why, message) if status == "False" && why == reason && message.contains(words) => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .unwrap();
        let told = events(&space, name);
        assert!(told.iter().any(|(_, note)| note.contains(reason)), "{told:?}");
    }
    // A pod that is there and has no endpoint, or is not ready, is another matter.
    space.kubectl("label pod -l app=web app=wbe --overwrite").ok().unwrap();
    eventually(SOON, || match condition(&space, "typo", "Ready")? {
        (status, ..) if status == "True" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
}

#[test]
fn while_endpoints_name_pods_that_nobody_has_seen_nothing_that_runs_goes() {
    let space = prepare("ghosts").controller("--swap-grace=0s").start().unwrap();
    let arn = bound(&space, 2);
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "ghost", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": ["10.244.77.7"], "targetRef": {"kind": "Pod", "name": "ghost", "namespace": "ghosts"}}],
    });
    space.apply(&slice).ok().unwrap();
    until(&space, "BackendResolved", "Unknown", "PodsUnknown");
    until_message(&space, "BackendResolved", "10.244.77.7:8080");
    // Both run, and are not wanted any more.
    let both = space.targets(&arn).unwrap();
    annotate(&space, "pods --all", "tgb.e2e/unready=true");
    until_endpoints(&space, "web", 0);
    until_message(&space, "TargetsRegistered", "2 targets not wanted any more, but left alone");
    assert_eq!(space.targets(&arn).unwrap(), both);
    space.kubectl("delete endpointslice ghost").ok().unwrap();
    space.until_targets(&arn, &BTreeSet::new()).unwrap();
    let note = until_event(&space, "Deregistered");
    assert!(note.contains("(pod web-") && note.contains("is not ready)"), "{note}");
}

#[test]
fn dead_targets_go_also_while_registration_is_throttled() {
    let space = space("throttled");
    let arn = bound(&space, 1);
    let first = space.pods("web", 8080).unwrap();
    let pod = |name: &str| {
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": "web"}]},
        });
        space.apply(&pod).ok().unwrap();
    };
    pod("early");
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    space.fault(Fault::new(Effect::Throttle).action("RegisterTargets")).unwrap();
    let calls = space.count("RegisterTargets");
    pod("late");
    until_calls(&space, "RegisterTargets", calls + 1);
    space.kubectl("delete pod early").ok().unwrap();
    space.until_targets(&arn, &first).unwrap();
    let note = until_event(&space, "Deregistered");
    assert!(note.contains("(pod early is "), "{note}");
    space.clear_faults().unwrap();
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
}

#[test]
fn of_targets_that_are_deregistered_only_those_that_aws_does_not_know_count_as_gone() {
    let space = space("unknown");
    let arn = bound(&space, 3);
    let pods = space.pods("web", 8080).unwrap();
    let stays = pods.first().unwrap();
    let ip = stays.split(':').next().unwrap();
    let message = format!("The following targets are not registered: '{ip}'");
    let refused = Effect::Error { status: 400, code: "InvalidTarget".to_owned(), message };
    space.fault(Fault::new(refused).action("DeregisterTargets").times(1)).unwrap();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), BTreeSet::from([stays.clone()]));
    assert_eq!(space.count("DeregisterTargets"), 2);
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
    // Whether there is room again is asked with one target, since others share the budget of these calls.
    let calls = space.count("RegisterTargets");
    until_calls(&space, "RegisterTargets", calls + 2);
    let all = space.calls();
    let mut last = all.iter().rev().filter(|call| call.action == "RegisterTargets");
    assert!(!last.next().unwrap().parameters.contains_key("Targets.member.2.Id"));
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
        let looks = space.count("DescribeTargetHealth");
        until_calls(&space, "DescribeTargetHealth", looks + 7);
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
    assert!(until_argo(&space, "web", "Suspended").contains("would register 2 targets"));
    assert_eq!(space.targets(&arn).unwrap().len(), 1);
    assert_eq!(space.controller().metric("tgb_planned_changes", &["change=\"register\""]).unwrap(), 2.0);
    space.kubectl("annotate tgb web elbv2.k8s.aws/paused-").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
    assert_eq!(until_argo(&space, "web", "Healthy"), "Reconciled: the target group is as the binding says");
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
    let space = prepare("retain").value("sharedTargets.namespaces={retain}").start().unwrap();
    let arn = bound(&space, 2);
    annotate(&space, "tgb web", "elbv2.k8s.aws/on-delete=retain");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), space.pods("web", 8080).unwrap());
    // The ConfigMap of a Shared one tells nobody anything any more.
    space.bind("web", &arn, &json!({"targetGroup": {"arn": arn, "sharing": "Shared"}})).unwrap();
    until(&space, "Ready", "True", "Reconciled");
    space.kubectl("get configmap aws-lbc-targets-web").ok().unwrap();
    annotate(&space, "tgb web", "elbv2.k8s.aws/on-delete=retain");
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!(space.targets(&arn).unwrap(), space.pods("web", 8080).unwrap());
    space.kubectl("get configmap aws-lbc-targets-web").refused().unwrap();
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
    assert!(until_argo(&space, "web", "Degraded").contains("DeregisterTargets"));
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

#[test]
fn a_target_group_that_vanishes_is_told_as_such_and_not_as_a_failed_call() {
    let space = space("vanishes");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    space.call("DeleteTargetGroup", &[("TargetGroupArn", &arn)]).unwrap();
    space.kubectl("scale deployment web --replicas=2").ok().unwrap();
    until(&space, "TargetGroupResolved", "False", "TargetGroupNotFound");
    assert!(until_event(&space, "ReconcileFailed").contains("TargetGroupNotFound"));
    let all = events(&space, "web");
    assert!(!all.iter().any(|(_, note)| note.contains("RegistrationFailed")), "{all:?}");
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
fn a_leader_that_is_cut_off_writes_nothing_and_goes_on_if_nobody_took_its_lease() {
    let space = prepare("cut-off")
        .controller("--health-poll=1s")
        .controller("--lease-duration=5s")
        .controller("--lease-renew-deadline=3s")
        .controller("--lease-retry-period=500ms")
        .start()
        .unwrap();
    let arn = bound(&space, 2);
    let pods = space.pods("web", 8080).unwrap();
    let leads = |want: f64| {
        eventually(SOON, || match space.controller().metric("tgb_leader", &[])? {
            leader if leader == want => Ok(()),
            leader => Err(format!("{leader}")),
        })
        .unwrap();
    };
    leads(1.0);
    space.controller().link().unwrap().hold();
    leads(0.0);
    // It would be put back within a second.
    let before = space.count("RegisterTargets");
    space.change_target("DeregisterTargets", &arn, pods.first().unwrap()).unwrap();
    stays("who may not write registers nothing", || space.count("RegisterTargets") == before);
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    space.controller().link().unwrap().open();
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
    leads(1.0);
    let log = space.controller().log();
    assert!(log.contains("renewed late, and is still ours"), "{log}");
    assert_eq!(log.matches("leading bindings=").count(), 1, "it started once: {log}");
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

#[test]
fn a_watch_that_is_answered_again_is_well_also_while_nothing_changes() {
    let space = space("seeing");
    let until_age = |is_right: fn(f64) -> bool| {
        eventually(SOON, || {
            match space.controller().metric("tgb_cache_age_seconds", &["cache=\"services\""])? {
                age if is_right(age) => Ok(()),
                age => Err(format!("{age} s")),
            }
        })
        .unwrap();
    };
    until_age(|age| age == 0.0);
    let link = space.controller().link().unwrap();
    link.cut();
    until_age(|age| age > 1.0);
    let said = get(space.controller().http(), "/readyz?verbose").unwrap();
    assert!(said.contains("the watch of services in seeing has been broken for"), "{said}");
    link.open();
    until_age(|age| age == 0.0);
}

// ---- readiness gates ----

/// Waits until so many targets are healthy and all gates are open; the time in between.
fn gate_after_health(space: &Space<'_>, arn: &str, count: usize) -> Duration {
    let gates = || -> Result<usize, String> {
        let path =
            "jsonpath={.items[*].status.conditions[?(@.type==\"target-health.elbv2.k8s.aws/web\")].status}";
        let all = space.kubectl(&format!("get pods -l app=web -o {path}")).ok()?;
        Ok(all.split(' ').filter(|status| *status == "True").count())
    };
    eventually(SOON, || {
        let open = gates()?;
        let healthy = space.health(arn)?.iter().filter(|target| target.state == "healthy").count();
        assert!(open < healthy, "{open} gates are open, {healthy} targets healthy");
        if healthy == count { Ok(()) } else { Err(format!("{healthy} healthy")) }
    })
    .unwrap();
    let since = Instant::now();
    // the first one was made before the binding
    eventually(SOON, || match gates()? {
        open if open == count - 1 => Ok(()),
        open => Err(format!("{open} gates are open")),
    })
    .unwrap();
    since.elapsed()
}

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
    // On a busy machine a measurement may fail, but not all of them.
    let mut took = Vec::new();
    for replicas in 2..=6 {
        registration_takes(&space, 4_000);
        space.kubectl(&format!("scale deployment web --replicas={replicas}")).ok().unwrap();
        took.push(gate_after_health(&space, &arn, replicas));
        if took.iter().any(|took| *took < Duration::from_secs(2)) {
            break;
        }
    }
    eprintln!("gates were open {took:?} after AWS's word");
    assert!(took.iter().any(|took| *took < Duration::from_secs(2)), "{took:?}");
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
fn the_gate_of_a_binding_that_cannot_resolve_says_why() {
    let space = space("shut");
    let arn = space.target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 0).unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
    until(&space, "TargetGroupResolved", "True", "Resolved");
    space.call("DeleteTargetGroup", &[("TargetGroupArn", &arn)]).unwrap();
    let kind = "target-health.elbv2.k8s.aws/web";
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"app": "web"}},
        "spec": {"readinessGates": [{"conditionType": kind}], "containers": [{"name": "web", "image": "web"}]},
    });
    space.apply(&pod).ok().unwrap();
    let gate = eventually(SOON, || {
        let object = space.kubectl("get pod web -o json").json()?;
        let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
        let gate = all.into_iter().find(|condition| condition["type"] == kind);
        gate.filter(|gate| gate["reason"] == "TargetGroupNotFound").ok_or(object)
    })
    .unwrap();
    assert_eq!(gate["status"], "False", "{gate}");
    assert!(gate["message"].as_str().is_some_and(|said| said.contains("TGB110")), "{gate}");
    // It does not keep a deletion.
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
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
    until_calls(&space, "DescribeTargetHealth", looks + 3);
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
    let lines = [
        "tgb_leader 1",
        "tgb_targets{state=\"healthy\"} 3",
        "tgb_bindings{reason=\"Reconciled\"} 1",
        "tgb_target_changes_total{change=\"registered\"} 3",
        "tgb_cache_age_seconds{cache=\"pods\"} 0",
        "tgb_queue_depth 0",
    ];
    // A pass may just be under way.
    let text = eventually(SOON, || {
        let text = get(space.controller().http(), "/metrics")?;
        let missing = lines.iter().find(|line| !text.contains(**line));
        missing.map_or(Ok(text.clone()), |line| Err(format!("{line} is not in\n{text}")))
    })
    .unwrap();
    let registered = space.controller().metric("tgb_endpoint_to_register_seconds_count", &[]).unwrap();
    assert!(
        registered >= 1.0 && text.contains("tgb_reconcile_total{result=\"ok\",reason=\"Reconciled\"}"),
        "{text}"
    );
}
