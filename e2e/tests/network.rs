//! Security groups, and how AWS's refusals, outages and limits are borne: each test with an account and a controller of
//! its own on one control plane.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use awsim::{Effect, Eni, Fault, Rule, Source};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tgb_e2e::{Aws, Cluster, Lab, Options, Result, Settings, Setup, Space, World, built, eventually};

const SOON: Duration = Duration::from_secs(60);
const DESCRIPTION: &str = "elbv2.k8s.aws/targetGroupBinding=shared";

fn space(name: &str) -> Space<'static> {
    World::shared().unwrap().space(name).unwrap()
}

/// The description of the rules of a test's installation.
fn marker(space: &Space<'_>) -> String {
    format!("{DESCRIPTION} cluster:demo owner:{}", space.name())
}

/// Puts an interface into the lab's first subnet; gives its id.
fn add_interface(aws: &mut awsim::Aws, lab: &Lab, eni: Eni) -> String {
    let id = aws.new_id("eni");
    let eni = Eni { id: id.clone(), vpc: lab.vpc.clone(), subnet: lab.subnets[0].clone(), ..eni };
    aws.enis.insert(id.clone(), eni);
    id
}

/// A source of traffic. Bindings of other tests are of the same cluster, and those of other namespaces count as wanting their
/// rules, so that each test has a source of its own.
fn peer_of(space: &Space<'_>) -> String {
    space.security_group("peer", &[]).unwrap()
}

fn shown(rule: &Rule) -> String {
    let source = match &rule.source {
        Source::Ipv4(net) => net.to_string(),
        Source::Ipv6(net) => net.to_string(),
        Source::Group(id, _) => id.clone(),
        Source::PrefixList(id) => id.clone(),
    };
    format!("{} {}-{} {source}", rule.protocol, rule.from, rule.to)
}

/// The rules of this installation in a group.
fn ours(space: &Space<'_>, group: &str) -> BTreeSet<String> {
    let marker = marker(space);
    let rules = space.rules(group).unwrap();
    let is_ours = |rule: &&Rule| {
        rule.description.as_deref() == Some(&marker) && !matches!(rule.source, Source::PrefixList(_))
    };
    rules.iter().filter(is_ours).map(shown).collect()
}

fn until_ours(space: &Space<'_>, group: &str, want: &[&str]) {
    let want: BTreeSet<String> = want.iter().map(|text| (*text).to_owned()).collect();
    eventually(SOON, || {
        let there = ours(space, group);
        if there == want { Ok(()) } else { Err(format!("{there:?}, not {want:?}")) }
    })
    .unwrap();
}

fn tcp(port: u16, source: Source, description: &str) -> Rule {
    Rule {
        id: String::new(),
        egress: false,
        protocol: "tcp".to_owned(),
        from: port.into(),
        to: port.into(),
        source,
        description: Some(description.to_owned()),
        tags: Default::default(),
    }
}

/// Puts a rule into a group as somebody else would, and gives its id.
fn add(space: &Space<'_>, group: &str, mut rule: Rule) -> String {
    space
        .seed(|aws| {
            rule.id = aws.new_id("sgr");
            let id = rule.id.clone();
            aws.security_groups.get_mut(group).unwrap().rules.push(rule);
            id
        })
        .unwrap()
}

fn networking(from: &Value, ports: &Value) -> Value {
    json!({"networking": {"ingress": [{"from": from, "ports": ports}]}})
}

fn message(space: &Space<'_>, binding: &str, kind: &str) -> String {
    let path = format!("jsonpath={{.status.conditions[?(@.type==\"{kind}\")].message}}");
    space.kubectl(&format!("get tgb {binding} -o {path}")).ok().unwrap()
}

#[test]
fn rules_are_the_union_of_all_bindings_and_nobody_elses_are_touched() {
    let space = World::shared().unwrap().prepare("union").controller("--resync=5s").start().unwrap();
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    let by_hand = [
        tcp(22, Source::Ipv4("10.0.0.0/8".parse().unwrap()), "ssh"),
        tcp(8080, Source::PrefixList("pl-0123456789abcdef0".to_owned()), &marker(&space)),
        tcp(8080, Source::Ipv4("10.9.0.0/16".parse().unwrap()), DESCRIPTION),
        tcp(8080, Source::Ipv4("10.8.0.0/16".parse().unwrap()), &format!("{DESCRIPTION} cluster:demo")),
    ];
    for rule in by_hand {
        add(&space, &nodes, rule);
    }
    let theirs = space.rules(&nodes).unwrap();
    let (one, two) = (
        space.served_target_group("HTTP", 80, "ip").unwrap(),
        space.served_target_group("HTTP", 80, "ip").unwrap(),
    );
    space.deploy("one", 2).unwrap();
    space.deploy("two", 1).unwrap();
    let peers = json!([
        {"securityGroup": {"groupID": lb}},
        {"ipBlock": {"cidr": "172.21.0.0/16"}},
    ]);
    let ports = json!([{"port": 8080}, {"port": 443, "protocol": "UDP"}]);
    space.bind("one", &one, &networking(&peers, &ports)).unwrap();
    assert_eq!(space.until_condition("tgb/one", "NetworkingReady", "True").unwrap(), "Authorized");
    let first: Vec<String> = [lb.as_str(), "172.21.0.0/16"]
        .iter()
        .flat_map(|source| [format!("tcp 8080-8080 {source}"), format!("udp 443-443 {source}")])
        .collect();
    let first: Vec<&str> = first.iter().map(String::as_str).collect();
    until_ours(&space, &nodes, &first);

    // The next port makes the range longer, and shorter again when its binding goes.
    let next = networking(&json!([{"securityGroup": {"groupID": lb}}]), &json!([{"port": 8081}]));
    space.bind("two", &two, &next).unwrap();
    let both: Vec<String> = first
        .iter()
        .map(|rule| rule.replace(&format!("8080-8080 {lb}"), &format!("8080-8081 {lb}")))
        .collect();
    until_ours(&space, &nodes, &both.iter().map(String::as_str).collect::<Vec<_>>());
    space.kubectl("delete tgb two --timeout=60s").ok().unwrap();
    until_ours(&space, &nodes, &first);

    // What somebody takes away by hand comes back at the next comparison.
    let gone = format!("tcp 8080-8080 {lb}");
    space
        .seed(|aws| {
            let marker = marker(&space);
            let rules = &mut aws.security_groups.get_mut(&nodes).unwrap().rules;
            rules.retain(|rule| shown(rule) != gone || rule.description.as_deref() != Some(&marker));
        })
        .unwrap();
    until_ours(&space, &nodes, &first);

    // Without endpoints it keeps its rules; when it goes, they go, and no others.
    space.kubectl("scale deployment one --replicas=0").ok().unwrap();
    space.until_targets(&one, &BTreeSet::new()).unwrap();
    until_ours(&space, &nodes, &first);
    space.kubectl("delete tgb one --timeout=60s").ok().unwrap();
    assert_eq!(space.rules(&nodes).unwrap(), theirs);
    let revoked = space.calls().iter().filter(|call| call.action == "RevokeSecurityGroupIngress").count();
    assert!(revoked >= 2, "{revoked}");
}

#[test]
fn without_ports_all_tcp_ports_are_open_and_a_named_port_is_the_pods() {
    let space = World::shared().unwrap().prepare("ports").controller("--health-poll=2s").start().unwrap();
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    // A target that drains still uses its rules.
    space.attribute(&arn, "deregistration_delay.timeout_seconds", "1").unwrap();
    space.deploy("web", 1).unwrap();
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    space.bind("web", &arn, &json!({"networking": {"ingress": [{"from": peer}]}})).unwrap();
    until_ours(&space, &nodes, &[&format!("tcp 0-65535 {lb}")]);
    let named = r#"[{"op":"add","path":"/spec/template/spec/containers/0/ports","value":[{"name":"http","containerPort":8080}]}]"#;
    space.kubectl_with(&["patch", "deployment", "web", "--type=json", "-p", named], "").ok().unwrap();
    space.bind("web", &arn, &networking(&peer, &json!([{"port": "http"}]))).unwrap();
    until_ours(&space, &nodes, &[&format!("tcp 8080-8080 {lb}")]);
}

#[test]
fn in_a_full_group_the_newest_binding_has_no_room_and_a_stale_rule_makes_some() {
    let space = World::shared().unwrap().prepare("full").controller("--resync=5s").start().unwrap();
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    space.seed(|aws| aws.quotas.rules_per_group = 3).unwrap();
    add(&space, &nodes, tcp(22, Source::Ipv4("10.0.0.0/8".parse().unwrap()), "ssh"));
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    for (name, port) in [("a", 1000), ("b", 2000), ("c", 3000)] {
        let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
        space.deploy(name, 1).unwrap();
        space.bind(name, &arn, &networking(&peer, &json!([{"port": port}]))).unwrap();
        // The API server's clock has seconds only.
        eventually(SOON, || match space.condition(&format!("tgb/{name}"), "NetworkingReady")? {
            (status, _) if status == "True" || status == "False" => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .unwrap();
    }
    let rules = |ports: &[u16]| -> Vec<String> {
        ports.iter().map(|port| format!("tcp {port}-{port} {lb}")).collect()
    };
    let want = |ports: &[u16]| {
        until_ours(&space, &nodes, &rules(ports).iter().map(String::as_str).collect::<Vec<_>>())
    };
    want(&[1000, 2000]);
    assert_eq!(space.until_condition("tgb/c", "NetworkingReady", "False").unwrap(), "RuleLimitExceeded");
    for name in ["a", "b"] {
        space.until_condition(&format!("tgb/{name}"), "NetworkingReady", "True").unwrap();
    }
    // Targets are registered all the same.
    space.until_condition("tgb/c", "TargetsRegistered", "True").unwrap();
    assert_eq!(space.count("RevokeSecurityGroupIngress"), 0);
    space.kubectl("delete tgb b --timeout=60s").ok().unwrap();
    want(&[1000, 3000]);
    space.until_condition("tgb/c", "NetworkingReady", "True").unwrap();
    let changed = space.count("ModifySecurityGroupRules") + space.count("RevokeSecurityGroupIngress");
    assert_eq!(changed, 1);
}

#[test]
fn a_full_group_is_widened_where_it_is_allowed_and_the_status_says_where() {
    let space =
        World::shared().unwrap().prepare("widened").controller("--rule-overflow=widen").start().unwrap();
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    space.seed(|aws| aws.quotas.rules_per_group = 2).unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    let ports = json!([{"port": 80}, {"port": 82}, {"port": 443}]);
    space.bind("web", &arn, &networking(&peer, &ports)).unwrap();
    until_ours(&space, &nodes, &[&format!("tcp 80-82 {lb}"), &format!("tcp 443-443 {lb}")]);
    space.until_condition("tgb/web", "NetworkingReady", "True").unwrap();
    let said = message(&space, "web", "NetworkingReady");
    assert!(said.contains("widened") && said.contains("tcp 80-82"), "{said}");
}

#[test]
fn one_bad_source_fails_its_own_binding_only() {
    let space = space("bad-source");
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    let (good, bad) = (
        space.served_target_group("HTTP", 80, "ip").unwrap(),
        space.served_target_group("HTTP", 80, "ip").unwrap(),
    );
    space.deploy("good", 1).unwrap();
    space.deploy("bad", 1).unwrap();
    let ports = json!([{"port": 8080}]);
    let unknown = json!([{"securityGroup": {"groupID": "sg-0123456789abcdef0"}}]);
    space.bind("bad", &bad, &networking(&unknown, &ports)).unwrap();
    let reason = space.until_condition("tgb/bad", "NetworkingReady", "False").unwrap();
    assert_eq!(reason, "SecurityGroupNotFound");
    let said = message(&space, "bad", "NetworkingReady");
    assert!(said.contains("sg-0123456789abcdef0") && said.contains(&nodes), "{said}");
    space.bind("good", &good, &networking(&json!([{"securityGroup": {"groupID": lb}}]), &ports)).unwrap();
    space.until_condition("tgb/good", "Ready", "True").unwrap();
    until_ours(&space, &nodes, &[&format!("tcp 8080-8080 {lb}")]);
    space.until_pods_are_targets(&bad, "bad", 1).unwrap();
}

#[test]
fn of_several_groups_the_tagged_one_is_taken_and_the_status_names_what_was_looked_for() {
    let space = space("several");
    let lb = peer_of(&space);
    let other = space.security_group("other", &[]).unwrap();
    let third = space.security_group("third", &[]).unwrap();
    let tag = "kubernetes.io/cluster/demo";
    let set = |groups: &[&str]| {
        let groups: Vec<String> = groups.iter().map(|id| (*id).to_owned()).collect();
        space.seed(|aws| aws.enis.values_mut().for_each(|eni| eni.groups = groups.clone())).unwrap();
    };
    set(&[&other, &third]);
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 1).unwrap();
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    space.bind("web", &arn, &networking(&peer, &json!([{"port": 8080}]))).unwrap();
    let reason = space.until_condition("tgb/web", "NetworkingReady", "False").unwrap();
    assert_eq!(reason, "SecurityGroupNotFound");
    let said = message(&space, "web", "NetworkingReady");
    for part in ["eni-", &other, &third, tag] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    space.until_pods_are_targets(&arn, "web", 1).unwrap();

    let tag_it = |group: &str| {
        space
            .seed(|aws| {
                aws.security_groups.get_mut(group).unwrap().tags.insert(tag.to_owned(), "owned".to_owned())
            })
            .unwrap();
    };
    let look_again = |n: usize| {
        // An answer that did not hold what was looked for is asked for again, but not within ten seconds.
        let line = format!("annotate tgb web look={n} --overwrite");
        space.kubectl(&line).ok().unwrap();
    };
    tag_it(&third);
    let mut n = 0;
    eventually(SOON, || {
        n += 1;
        look_again(n);
        match space.condition("tgb/web", "NetworkingReady")? {
            (status, _) if status == "True" => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    until_ours(&space, &third, &[&format!("tcp 8080-8080 {lb}")]);
    assert!(ours(&space, &other).is_empty());

    // Both tagged, seen by a controller that starts anew: it says so and takes nothing away.
    tag_it(&other);
    space.controller().kill().unwrap();
    give_lease_back(&space);
    space.controller().restart().unwrap();
    eventually(SOON, || match space.condition("tgb/web", "NetworkingReady")? {
        (_, reason) if reason == "SecurityGroupAmbiguous" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    until_ours(&space, &third, &[&format!("tcp 8080-8080 {lb}")]);
}

/// Lets a controller that starts next lead at once, as if the lease of a killed one had run out.
fn give_lease_back(space: &Space<'_>) {
    let (namespace, lease) = (format!("{}-tgb", space.name()), format!("tgb-{}-controller", space.name()));
    let patch = r#"{"spec": {"holderIdentity": ""}}"#;
    let args = ["-n", namespace.as_str(), "patch", "lease", lease.as_str(), "--type=merge", "-p", patch];
    // One that was killed at once may not have made it yet.
    let _ = space.cluster().kubectl(&args);
}

#[test]
fn the_interface_of_a_pod_is_the_one_of_its_annotation() {
    let space = space("pod-eni");
    let lab = space.aws().lab().clone();
    let lb = peer_of(&space);
    let own = space.security_group("pods", &[]).unwrap();
    let eni = space
        .seed(|aws| {
            let eni = Eni { groups: vec![own.clone()], ..Eni::default() };
            add_interface(aws, &lab, eni)
        })
        .unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 0).unwrap();
    let annotation = json!([{"eniId": eni, "privateIp": "10.244.0.99"}]).to_string();
    let patch = json!({"spec": {"replicas": 1, "template": {"metadata": {"annotations": {"vpc.amazonaws.com/pod-eni": annotation}}}}});
    space.kubectl_with(&["patch", "deployment", "web", "-p", &patch.to_string()], "").ok().unwrap();
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    space.bind("web", &arn, &networking(&peer, &json!([{"port": 8080}]))).unwrap();
    until_ours(&space, &own, &[&format!("tcp 8080-8080 {lb}")]);
    assert!(ours(&space, &lab.node_group).is_empty());
    space.until_condition("tgb/web", "Ready", "True").unwrap();
}

#[test]
fn the_interface_is_found_by_prefix_or_by_address_and_hybrid_nodes_have_none() {
    let space = space("where");
    let lab = space.aws().lab().clone();
    let lb = peer_of(&space);
    let instance = "i-0e0000000000000e1";
    let (prefixed, fargate) =
        (space.security_group("prefixed", &[]).unwrap(), space.security_group("fargate", &[]).unwrap());
    // The pods of the first node are in a prefix of its second interface.
    space
        .seed(|aws| {
            let model = aws.instances.values().next().cloned().unwrap();
            let private_ip = "192.168.9.8".parse().ok();
            let own =
                awsim::Instance { id: instance.to_owned(), private_ip, private_dns: String::new(), ..model };
            aws.add_instance(own, Vec::new(), Vec::new());
            let eni = Eni {
                groups: vec![prefixed.clone()],
                instance: Some(instance.to_owned()),
                device_index: 1,
                prefixes: vec!["10.244.50.0/24".parse().unwrap()],
                ..Eni::default()
            };
            add_interface(aws, &lab, eni);
        })
        .unwrap();
    let kinds = [
        ("where-ec2", "", format!("aws:///us-west-2a/{instance}")),
        ("where-fargate", "fargate", "aws:///us-west-2a/0123456789-abcdef/fargate-ip-10-244-51-1".to_owned()),
        ("where-hybrid", "hybrid", "eks-hybrid:///us-west-2/demo/mi-0123456789abcdef0".to_owned()),
    ];
    let mut objects = Vec::new();
    for (n, (name, compute, provider)) in kinds.iter().enumerate() {
        let mut labels = json!({"node.kubernetes.io/exclude-from-external-load-balancers": ""});
        if !compute.is_empty() {
            labels["eks.amazonaws.com/compute-type"] = json!(compute);
        }
        objects.push(json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": labels, "annotations": {"tgb.e2e/ip": format!("192.168.9.{n}")}},
            "spec": {"providerID": provider, "podCIDR": format!("10.244.{}.0/24", 50 + n), "unschedulable": true},
        }));
    }
    for (name, ..) in &kinds {
        objects.push(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": "web"}},
            "spec": {"nodeName": name, "containers": [{"name": "web", "image": "web"}]},
        }));
    }
    objects.push(json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    }));
    space.apply(&json!({"apiVersion": "v1", "kind": "List", "items": objects})).ok().unwrap();
    let address = |pod: &str| {
        eventually(SOON, || {
            let ip = space.kubectl(&format!("get pod {pod} -o jsonpath={{.status.podIP}}")).ok()?;
            if ip.is_empty() { Err("no address yet".to_owned()) } else { Ok(ip) }
        })
        .unwrap()
    };
    let (at_fargate, at_hybrid) = (address("where-fargate"), address("where-hybrid"));
    assert!(address("where-ec2").starts_with("10.244.50."));
    space
        .seed(|aws| {
            let private_ips = vec![at_fargate.parse().unwrap()];
            let eni = Eni { groups: vec![fargate.clone()], private_ips, ..Eni::default() };
            add_interface(aws, &lab, eni);
        })
        .unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let peers = json!([{"securityGroup": {"groupID": lb}}]);
    space.bind("web", &arn, &networking(&peers, &json!([{"port": 8080}]))).unwrap();
    for group in [&prefixed, &fargate] {
        until_ours(&space, group, &[&format!("tcp 8080-8080 {lb}")]);
    }
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
    space.until_condition("tgb/web", "Ready", "True").unwrap();
    let said = message(&space, "web", "NetworkingReady");
    assert_eq!(said, "2 security groups have the rules");
    assert!(ours(&space, &lab.node_group).is_empty());
    let asks = |address: &str| {
        let calls = space.calls();
        let of_it = |call: &&awsim::Call| call.parameters.values().any(|value| value == address);
        calls.iter().filter(|call| call.action == "DescribeNetworkInterfaces").filter(of_it).count()
    };
    assert_eq!((asks(&at_fargate) > 0, asks(&at_hybrid)), (true, 0));
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    for group in [&prefixed, &fargate] {
        until_ours(&space, group, &[]);
    }
    for (name, ..) in &kinds {
        space.kubectl(&format!("delete pod {name} --grace-period=0 --force")).ok().unwrap();
        space.kubectl(&format!("delete node {name}")).ok().unwrap();
    }
}

/// Makes a Deployment of one pod and a Service of it whose pod, by its annotation, has this interface.
fn deploy_at(space: &Space<'_>, name: &str, eni: &str) {
    space.deploy(name, 0).unwrap();
    let annotation = json!([{"eniId": eni}]).to_string();
    let patch = json!({"spec": {"replicas": 1, "template": {"metadata": {"annotations": {"vpc.amazonaws.com/pod-eni": annotation}}}}});
    space.kubectl_with(&["patch", "deployment", name, "-p", &patch.to_string()], "").ok().unwrap();
}

/// The notes of the events on a binding for a reason.
fn notes(space: &Space<'_>, binding: &str, reason: &str) -> Result<Vec<String>> {
    let all = space.kubectl("get events.events.k8s.io -o json").json()?;
    let all = all["items"].as_array().cloned().unwrap_or_default();
    let of_it = all.iter().filter(|event| event["regarding"]["name"] == binding && event["reason"] == reason);
    Ok(of_it.filter_map(|event| event["note"].as_str().map(str::to_owned)).collect())
}

fn until_note(space: &Space<'_>, binding: &str, reason: &str, parts: &[&str]) {
    eventually(SOON, || {
        let all = notes(space, binding, reason)?;
        let is_meant = |note: &String| parts.iter().all(|part| note.contains(part));
        if all.iter().any(is_meant) { Ok(()) } else { Err(format!("{all:?}")) }
    })
    .unwrap();
}

/// Has another controller take over at once.
fn restart(space: &Space<'_>) {
    space.controller().kill().unwrap();
    give_lease_back(space);
    space.controller().restart().unwrap();
}

#[test]
fn a_binding_that_cannot_be_resolved_keeps_its_own_rules_and_holds_up_nobody_else() {
    let space = World::shared().unwrap().prepare("sick").controller("--resync=3s").start().unwrap();
    let nodes = space.aws().lab().node_group.clone();
    let (sick, well) = (
        space.served_target_group("HTTP", 80, "ip").unwrap(),
        space.served_target_group("HTTP", 80, "ip").unwrap(),
    );
    let (first, second) = (peer_of(&space), space.security_group("second", &[]).unwrap());
    let ports = |peer: &str, ports: &[u16]| {
        let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port})).collect();
        networking(&json!([{"securityGroup": {"groupID": peer}}]), &json!(ports))
    };
    space.deploy("sick", 1).unwrap();
    space.deploy("well", 1).unwrap();
    space.bind("sick", &sick, &ports(&first, &[1000])).unwrap();
    space.bind("well", &well, &ports(&second, &[2000, 3000])).unwrap();
    let opened = |rules: &[(u16, &str)]| {
        let rules: Vec<String> =
            rules.iter().map(|(port, peer)| format!("tcp {port}-{port} {peer}")).collect();
        until_ours(&space, &nodes, &rules.iter().map(String::as_str).collect::<Vec<_>>());
    };
    opened(&[(1000, &first), (2000, &second), (3000, &second)]);

    // To the next controller nothing is known of it but its spec.
    space.fault(Fault::new(Effect::Deny).action("DescribeTargetHealth").contains(&sick)).unwrap();
    restart(&space);
    space.until_condition("tgb/sick", "TargetsRegistered", "False").unwrap();
    space.bind("well", &well, &ports(&second, &[2000])).unwrap();
    opened(&[(1000, &first), (2000, &second)]);
    space.kubectl("delete tgb well --timeout=60s").ok().unwrap();
    opened(&[(1000, &first)]);
    space.clear_faults().unwrap();
    space.kubectl("delete tgb sick --timeout=60s").ok().unwrap();
    opened(&[]);
}

#[test]
fn a_revocation_that_is_denied_is_told_and_holds_up_only_the_deletion_of_who_had_the_rule() {
    let space = World::shared().unwrap().prepare("stuck").controller("--resync=3s").start().unwrap();
    let lab = space.aws().lab().clone();
    let (nodes, peer) = (lab.node_group.clone(), peer_of(&space));
    let own = space.security_group("own", &[]).unwrap();
    let eni = space
        .seed(|aws| add_interface(aws, &lab, Eni { groups: vec![own.clone()], ..Eni::default() }))
        .unwrap();
    let (web, stuck) = (
        space.served_target_group("HTTP", 80, "ip").unwrap(),
        space.served_target_group("HTTP", 80, "ip").unwrap(),
    );
    let ports = |ports: &[u16]| {
        let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port})).collect();
        networking(&json!([{"securityGroup": {"groupID": peer}}]), &json!(ports))
    };
    let opened = |port: u16| format!("tcp {port}-{port} {peer}");
    space.deploy("web", 1).unwrap();
    space.bind("web", &web, &ports(&[8080])).unwrap();
    deploy_at(&space, "stuck", &eni);
    space.bind("stuck", &stuck, &ports(&[1000, 2000])).unwrap();
    until_ours(&space, &nodes, &[&opened(8080)]);
    until_ours(&space, &own, &[&opened(1000), &opened(2000)]);

    space.fault(Fault::new(Effect::Deny).action("RevokeSecurityGroupIngress").contains(&own)).unwrap();
    space.bind("stuck", &stuck, &ports(&[1000])).unwrap();
    let told = || {
        eventually(SOON, || {
            let (status, said) = (
                space.condition("tgb/stuck", "NetworkingReady")?.0,
                message(&space, "stuck", "NetworkingReady"),
            );
            let parts = [own.as_str(), "tcp 2000", "RevokeSecurityGroupIngress", "UnauthorizedOperation"];
            let is_told = status == "True" && parts.iter().all(|part| said.contains(part));
            if is_told { Ok(()) } else { Err(format!("{status}: {said}")) }
        })
        .unwrap();
    };
    told();
    until_note(&space, "stuck", "NetworkingFailed", &["AccessDenied", &own, "RevokeSecurityGroupIngress"]);
    assert_eq!(space.controller().metric("tgb_stale_rules", &[]).unwrap(), 1.0);

    // A controller that knows no claim yet waits for no group but those with rules of the binding.
    restart(&space);
    told();
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    until_ours(&space, &nodes, &[]);
    space.kubectl("delete tgb stuck --wait=false").ok().unwrap();
    space.until_condition("tgb/stuck", "CleanupFailed", "True").unwrap();
    let said = message(&space, "stuck", "CleanupFailed");
    assert!(said.contains(&own) && said.contains("RevokeSecurityGroupIngress"), "{said}");
    space.clear_faults().unwrap();
    space.kubectl("wait --for=delete tgb/stuck --timeout=120s").ok().unwrap();
    until_ours(&space, &own, &[]);
}

#[test]
fn rules_of_a_binding_that_is_deleted_with_retain_stay_for_good() {
    let space = World::shared().unwrap().prepare("retained").controller("--resync=3s").start().unwrap();
    let (nodes, peer) = (space.aws().lab().node_group.clone(), peer_of(&space));
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let ports = |ports: &[u16]| {
        let ports: Vec<Value> = ports.iter().map(|port| json!({"port": port})).collect();
        networking(&json!([{"securityGroup": {"groupID": peer}}]), &json!(ports))
    };
    let opened = |port: u16| format!("tcp {port}-{port} {peer}");
    space.deploy("web", 1).unwrap();
    space.bind("web", &arn, &ports(&[8080])).unwrap();
    until_ours(&space, &nodes, &[&opened(8080)]);
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    // What can't be described so would go with the next search.
    space.fault(Fault::new(Effect::Deny).action("ModifySecurityGroupRules")).unwrap();
    space.kubectl("annotate tgb web elbv2.k8s.aws/on-delete=retain").ok().unwrap();
    space.kubectl("delete tgb web --wait=false").ok().unwrap();
    space.until_condition("tgb/web", "CleanupFailed", "True").unwrap();
    space.clear_faults().unwrap();
    space.kubectl("wait --for=delete tgb/web --timeout=120s").ok().unwrap();
    let description = format!("{} retained:{}/web", marker(&space), space.name());
    let retained = || -> Vec<String> {
        let rules = space.rules(&nodes).unwrap();
        rules.iter().filter(|rule| rule.description.as_deref() == Some(&description)).map(shown).collect()
    };
    assert_eq!((retained(), ours(&space, &nodes)), (vec![opened(8080)], BTreeSet::new()));
    until_note(&space, "web", "RulesRetained", &[&nodes, &description, "revoke-security-group-ingress"]);
    space.until_pods_are_targets(&arn, "web", 1).unwrap();

    // Neither the search at the next start takes it, nor the end of a binding for which it counted as there.
    restart(&space);
    space.bind("web", &arn, &ports(&[8080, 9090])).unwrap();
    space.until_condition("tgb/web", "Ready", "True").unwrap();
    until_ours(&space, &nodes, &[&opened(9090)]);
    space.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    assert_eq!((retained(), ours(&space, &nodes)), (vec![opened(8080)], BTreeSet::new()));
}

#[test]
fn a_port_name_that_no_container_has_is_told_and_native_sidecars_have_names_too() {
    let space = space("names");
    let (nodes, peer) = (space.aws().lab().node_group.clone(), peer_of(&space));
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 0).unwrap();
    let port = |name: &str, number: u16| json!([{"name": name, "containerPort": number}]);
    let spec = json!({
        "containers": [
            {"name": "web", "image": "web", "ports": port("http", 8080)},
            {"name": "exporter", "image": "exporter", "ports": port("http", 9100)},
        ],
        "initContainers": [
            {"name": "proxy", "image": "proxy", "restartPolicy": "Always", "ports": port("admin", 15000)},
        ],
    });
    let patch = json!({"spec": {"replicas": 1, "template": {"spec": spec}}});
    space.kubectl_with(&["patch", "deployment", "web", "-p", &patch.to_string()], "").ok().unwrap();
    let named =
        |name: &str| networking(&json!([{"securityGroup": {"groupID": peer}}]), &json!([{"port": name}]));
    space.bind("web", &arn, &named("web")).unwrap();
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    eventually(SOON, || match space.condition("tgb/web", "NetworkingReady")? {
        (status, reason) if status == "False" && reason == "PortNotFound" => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    let said = message(&space, "web", "NetworkingReady");
    for part in ["\"web\" (TCP)", "\"http\" (TCP)", "\"admin\" (TCP)"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    assert!(ours(&space, &nodes).is_empty());
    for (name, number) in [("admin", 15000), ("http", 8080)] {
        space.bind("web", &arn, &named(name)).unwrap();
        until_ours(&space, &nodes, &[&format!("tcp {number}-{number} {peer}")]);
        space.until_condition("tgb/web", "NetworkingReady", "True").unwrap();
    }
}

#[test]
fn an_interface_that_shows_up_late_is_looked_for_again_before_the_next_poll() {
    let space = World::shared().unwrap().prepare("late").controller("--health-poll=10m").start().unwrap();
    let lab = space.aws().lab().clone();
    let peer = peer_of(&space);
    let own = space.security_group("own", &[]).unwrap();
    let eni = "eni-0abcdef0123456789";
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    deploy_at(&space, "web", eni);
    let peers = json!([{"securityGroup": {"groupID": peer}}]);
    space.bind("web", &arn, &networking(&peers, &json!([{"port": 8080}]))).unwrap();
    let reason = space.until_condition("tgb/web", "NetworkingReady", "False").unwrap();
    assert_eq!(reason, "SecurityGroupNotFound");
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    space
        .seed(|aws| {
            let (vpc, subnet) = (lab.vpc.clone(), lab.subnets[0].clone());
            let late = Eni { id: eni.to_owned(), vpc, subnet, groups: vec![own.clone()], ..Eni::default() };
            aws.enis.insert(eni.to_owned(), late);
        })
        .unwrap();
    until_ours(&space, &own, &[&format!("tcp 8080-8080 {peer}")]);
    space.until_condition("tgb/web", "NetworkingReady", "True").unwrap();
}

#[test]
fn rules_of_a_shared_binding_stay_where_its_old_targets_drain() {
    let space = World::shared()
        .unwrap()
        .prepare("moves")
        .value("sharedTargets.namespaces={moves}")
        .controller("--resync=3s")
        .controller("--health-poll=2s")
        .start()
        .unwrap();
    let lab = space.aws().lab().clone();
    let (nodes, peer) = (lab.node_group.clone(), peer_of(&space));
    let own = space.security_group("own", &[]).unwrap();
    let eni = space
        .seed(|aws| add_interface(aws, &lab, Eni { groups: vec![own.clone()], ..Eni::default() }))
        .unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.attribute(&arn, "deregistration_delay.timeout_seconds", "3600").unwrap();
    let rule = format!("tcp 8080-8080 {peer}");
    let shared = json!({
        "targetGroup": {"arn": arn, "sharing": "Shared"},
        "networking": {"ingress": [{"from": [{"securityGroup": {"groupID": peer}}], "ports": [{"port": 8080}]}]},
    });
    space.deploy("web", 1).unwrap();
    space.bind("web", &arn, &shared).unwrap();
    until_ours(&space, &nodes, &[&rule]);
    space.until_pods_are_targets(&arn, "web", 1).unwrap();
    space.until_condition("tgb/web", "Ready", "True").unwrap();
    let node = space.kubectl("get pods -l app=web -o jsonpath={.items[0].spec.nodeName}").ok().unwrap();
    space.kubectl("scale deployment web --replicas=0").ok().unwrap();
    space.until_targets(&arn, &BTreeSet::new()).unwrap();
    // On the other node, since the address of the pod that is gone may be given again on its own, and its target has to go on
    // draining.
    let elsewhere = if node == "node-1" { "node-2" } else { "node-1" };
    let patch = json!({"spec": {"template": {"spec": {"nodeName": elsewhere}}}}).to_string();
    space.kubectl_with(&["patch", "deployment", "web", "-p", &patch], "").ok().unwrap();
    deploy_at(&space, "web", &eni);
    until_ours(&space, &own, &[&rule]);
    // Both groups are compared again, and the old rule is still there.
    let reads = || {
        let calls = space.calls();
        let of_it = |call: &&awsim::Call| call.parameters.values().any(|value| *value == nodes);
        calls.iter().filter(|call| call.action == "DescribeSecurityGroupRules").filter(of_it).count()
    };
    let before = reads();
    eventually(SOON, || if reads() >= before + 2 { Ok(()) } else { Err(reads()) }).unwrap();
    assert_eq!(ours(&space, &nodes), BTreeSet::from([rule.clone()]));
    space.advance(Duration::from_secs(3700)).unwrap();
    until_ours(&space, &nodes, &[]);
    assert_eq!(ours(&space, &own), BTreeSet::from([rule]));
}

/// The account of what the tests of this binary share, which no space has.
fn shared_account(_: &Cluster) -> Result<Aws> {
    Ok(World::shared()?.aws.clone())
}

#[test]
fn two_clusters_on_one_security_group_never_take_each_others_rules() {
    let world = World::shared().unwrap();
    let one = world.prepare("one-of-two").account(&world.aws).controller("--resync=3s").start().unwrap();
    let product = Settings {
        controller: vec!["--cluster-name=other".to_owned(), "--resync=3s".to_owned()],
        ..Settings::default()
    };
    let other =
        World::start(&Setup { cluster: Options::default(), product: &product, aws: shared_account }).unwrap();
    let two = other.space("two-of-two").unwrap();
    let (group, peer) = (world.aws.lab().node_group.clone(), peer_of(&one));
    let rules_of = |description: &str| -> BTreeSet<String> {
        let rules = one.rules(&group).unwrap();
        rules.iter().filter(|rule| rule.description.as_deref() == Some(description)).map(shown).collect()
    };
    let (first, second) = (marker(&one), format!("{DESCRIPTION} cluster:other"));
    let until = |want: [&[u16]; 2]| {
        let of = |ports: &[u16]| -> BTreeSet<String> {
            ports.iter().map(|port| format!("tcp {port}-{port} {peer}")).collect()
        };
        let want = want.map(of);
        eventually(SOON, || {
            let there = [rules_of(&first), rules_of(&second)];
            if there == want { Ok(()) } else { Err(format!("{there:?}, not {want:?}")) }
        })
        .unwrap();
    };
    let rule = |port: u16| {
        networking(&json!([{"securityGroup": {"groupID": peer}}]), &json!([{"port": port}, {"port": 8080}]))
    };
    for (space, port) in [(&one, 1000), (&two, 2000)] {
        let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
        // A target that drains still uses its rules.
        space.attribute(&arn, "deregistration_delay.timeout_seconds", "1").unwrap();
        space.deploy("web", 1).unwrap();
        space.bind("web", &arn, &rule(port)).unwrap();
        space.until_pods_are_targets(&arn, "web", 1).unwrap();
        space.until_condition("tgb/web", "Ready", "True").unwrap();
    }
    // What both want is the first one's, as EC2 has it once only.
    until([&[1000, 8080], &[2000]]);
    // Both look again, and leave it at that.
    let reads =
        || world.aws.calls().iter().filter(|call| call.action == "DescribeSecurityGroupRules").count();
    let before = reads();
    eventually(SOON, || match reads() {
        n if n >= before + 4 => Ok(()),
        n => Err(format!("{n} reads, {before} before")),
    })
    .unwrap();
    until([&[1000, 8080], &[2000]]);
    let revokes =
        || world.aws.calls().iter().filter(|call| call.action == "RevokeSecurityGroupIngress").count();
    assert_eq!(revokes(), 0);
    // The first one goes, and takes its own with it; the second one puts back what it still needs.
    one.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    until([&[], &[2000, 8080]]);
    two.kubectl("delete tgb web --timeout=60s").ok().unwrap();
    until([&[], &[]]);
}

#[test]
fn what_nobody_wants_any_more_is_found_at_start_also_without_a_vpc_being_given() {
    let space = space("left-over");
    let lab = space.aws().lab().clone();
    let forgotten = space.security_group("forgotten", &[]).unwrap();
    let block = || Source::Ipv4("10.1.0.0/16".parse().unwrap());
    space.controller().kill().unwrap();
    give_lease_back(&space);
    add(&space, &forgotten, tcp(9000, block(), &marker(&space)));
    let lbcs = add(&space, &forgotten, tcp(9001, block(), DESCRIPTION));
    let theirs =
        add(&space, &lab.node_group, tcp(9000, block(), &format!("{DESCRIPTION} cluster:demo owner:x")));
    space.controller().restart_with(&["--aws-vpc-id="]).unwrap();
    until_ours(&space, &forgotten, &[]);
    let ids = |group: &str| -> Vec<String> {
        space.rules(group).unwrap().into_iter().map(|rule| rule.id).collect()
    };
    assert_eq!((ids(&forgotten), ids(&lab.node_group)), (vec![lbcs], vec![theirs]));

    // LBC's exact text is ours only where that is said.
    space.controller().kill().unwrap();
    give_lease_back(&space);
    space.controller().restart_with(&["--adopt-unmarked-rules"]).unwrap();
    eventually(SOON, || match ids(&forgotten) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    })
    .unwrap();
    assert_eq!(ids(&lab.node_group).len(), 1);
}

#[test]
fn a_missing_permission_is_named_with_its_action_and_holds_back_nothing_else() {
    let space = space("denied");
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    // First it does not answer for some seconds, then it refuses.
    let fault = |effect: Effect| Fault::new(effect).action("AuthorizeSecurityGroupIngress");
    space.fault(fault(Effect::Unavailable).times(10)).unwrap();
    space.fault(fault(Effect::Deny)).unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.deploy("web", 2).unwrap();
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    space.bind("web", &arn, &networking(&peer, &json!([{"port": 8080}]))).unwrap();
    for reason in ["AwsUnavailable", "AccessDenied"] {
        eventually(SOON, || match space.condition("tgb/web", "NetworkingReady")? {
            (status, now) if status == "False" && now == reason => Ok(()),
            other => Err(format!("{other:?}, not {reason}")),
        })
        .unwrap();
    }
    space.until_pods_are_targets(&arn, "web", 2).unwrap();
    let said = message(&space, "web", "NetworkingReady");
    assert!(said.contains("AuthorizeSecurityGroupIngress"), "{said}");
    space.clear_faults().unwrap();
    space.kubectl("annotate tgb web touched=1").ok().unwrap();
    until_ours(&space, &nodes, &[&format!("tcp 8080-8080 {lb}")]);

    space.fault(Fault::new(Effect::Deny).action("RegisterTargets")).unwrap();
    space.kubectl("scale deployment web --replicas=3").ok().unwrap();
    space.until_condition("tgb/web", "TargetsRegistered", "False").unwrap();
    let said = message(&space, "web", "TargetsRegistered");
    assert!(said.contains("RegisterTargets") && said.contains("AccessDenied"), "{said}");
    space.clear_faults().unwrap();
    space.kubectl("annotate tgb web touched=2 --overwrite").ok().unwrap();
    space.until_pods_are_targets(&arn, "web", 3).unwrap();
}

/// `TGB_OUTAGE_SECONDS=600` makes it last ten minutes.
#[test]
fn after_an_outage_everything_is_made_good_at_once() {
    let space = space("outage");
    let (nodes, lb) = (space.aws().lab().node_group.clone(), peer_of(&space));
    let peer = json!([{"securityGroup": {"groupID": lb}}]);
    let arns: Vec<String> = ["a", "b", "c"]
        .iter()
        .map(|name| {
            let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
            space.deploy(name, 1).unwrap();
            space.bind(name, &arn, &json!({})).unwrap();
            space.until_pods_are_targets(&arn, name, 1).unwrap();
            arn
        })
        .collect();
    space.fault(Fault::new(Effect::Unavailable)).unwrap();
    for name in ["a", "b", "c"] {
        space.kubectl(&format!("scale deployment {name} --replicas=2")).ok().unwrap();
    }
    let spec = json!({"spec": networking(&peer, &json!([{"port": 8080}]))});
    space.kubectl_with(&["patch", "tgb", "a", "--type=merge", "-p", &spec.to_string()], "").ok().unwrap();
    for name in ["a", "b", "c"] {
        space.until_condition(&format!("tgb/{name}"), "Ready", "False").unwrap();
    }
    // By now a single binding waits longer and longer.
    let failures =
        || -> Vec<awsim::Call> { space.calls().into_iter().filter(|call| call.status == 503).collect() };
    eventually(SOON, || if failures().len() > 20 { Ok(()) } else { Err(failures().len()) }).unwrap();
    let lasts = std::env::var("TGB_OUTAGE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let over = Instant::now() + Duration::from_secs(lasts);
    eventually(Duration::from_secs(lasts + 60), || {
        if Instant::now() >= over { Ok(()) } else { Err("not over") }
    })
    .unwrap();
    // Nobody waits longer than a minute for the next try, and what a loaded machine takes.
    let until = space.calls().last().unwrap().real_us;
    for arn in &arns {
        let calls = failures();
        let of_it = calls.iter().filter(|call| call.parameters.values().any(|value| value == arn));
        let times: Vec<u64> = of_it.map(|call| call.real_us).chain([until]).collect();
        let longest = times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])).max();
        let longest = Duration::from_micros(longest.unwrap_or_default());
        eprintln!("asked {} times in the outage, {longest:?} apart at most", times.len() - 1);
        assert!(longest < Duration::from_secs(75), "{longest:?}: {times:?}");
    }
    space.clear_faults().unwrap();
    let cleared = u64::try_from(space.server().unwrap().elapsed().as_micros()).unwrap();
    for (name, arn) in ["a", "b", "c"].iter().zip(&arns) {
        space.until_pods_are_targets(arn, name, 2).unwrap();
    }
    until_ours(&space, &nodes, &[&format!("tcp 8080-8080 {lb}")]);
    // By the journal: looking takes time, too.
    let calls = space.calls();
    let changes = calls
        .iter()
        .filter(|call| call.real_us > cleared && call.code.is_none())
        .filter(|call| ["RegisterTargets", "AuthorizeSecurityGroupIngress"].contains(&call.action.as_str()));
    let last = changes.map(|call| call.real_us).max().unwrap();
    let took = Duration::from_micros(last - cleared);
    eprintln!("made good {took:?} after the outage");
    // Two seconds to the next question, and what a loaded machine takes; by itself a binding would wait for up to a minute.
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert!(space.controller().log().contains("AWS answers again"));
}

#[test]
fn throttled_calls_slow_their_own_class_and_all_are_made_in_the_end() {
    let space = space("throttled");
    let names = ["a", "b", "c", "d"];
    let mut arns = Vec::new();
    for name in names {
        arns.push(space.served_target_group("HTTP", 80, "ip").unwrap());
        space.deploy(name, 1).unwrap();
    }
    space.fault(Fault::new(Effect::Throttle).action("RegisterTargets").times(6)).unwrap();
    for (name, arn) in names.iter().zip(&arns) {
        space.bind(name, arn, &json!({})).unwrap();
    }
    for (name, arn) in names.iter().zip(&arns) {
        space.until_pods_are_targets(arn, name, 1).unwrap();
    }
    let controller = space.controller();
    let metric = |name: &str, labels: &[&str]| controller.metric(name, labels).unwrap();
    let throttled = metric("tgb_aws_calls_total", &["operation=\"RegisterTargets\"", "code=\"Throttling\""]);
    assert!(throttled >= 6.0, "{throttled}");
    assert!(metric("tgb_aws_calls_total", &["service=\"elasticloadbalancing\"", "code=\"ok\""]) > 0.0);
    assert!(metric("tgb_aws_call_retries_total", &["operation=\"RegisterTargets\""]) > 0.0);
    assert!(metric("tgb_aws_wait_seconds_count", &["class=\"elb-targets\""]) > 0.0);
    assert!(metric("tgb_aws_call_duration_seconds_count", &["operation=\"DescribeTargetHealth\""]) > 0.0);
}

#[test]
fn the_role_of_another_account_is_assumed_once_and_its_external_id_is_nowhere_to_be_read() {
    const SECRET: &str = "correct-horse-battery";
    let role = "arn:aws:iam::555566667777:role/tgb";
    let space = World::shared()
        .unwrap()
        .prepare("roles")
        .controller("--assume-role-allow=arn:aws:iam::555566667777:role/*")
        .controller("--log-level=debug")
        .webhook("--assume-role-allow=arn:aws:iam::555566667777:role/*")
        .start()
        .unwrap();
    let server = space.server().unwrap();
    server.add_role(awsim::Role {
        arn: role.to_owned(),
        trusts: vec![space.aws().account().to_owned()],
        external_id: Some(SECRET.to_owned()),
        max_duration: 0,
    });
    let vpc = space.aws().lab().vpc.clone();
    let cluster = awsim::Cluster { vpc, ..awsim::Cluster::default() };
    server.seed("555566667777", "us-west-2", |aws| aws.seed_cluster(&cluster));
    let made = server
        .call(
            ("555566667777", "USER"),
            "us-west-2",
            awsim::Service::Elb,
            "CreateTargetGroup",
            &[
                ("Name", "away"),
                ("Protocol", "HTTP"),
                ("Port", "80"),
                ("TargetType", "ip"),
                ("VpcId", &cluster.vpc),
            ],
        )
        .unwrap();
    let arn = made.split("<TargetGroupArn>").nth(1).unwrap().split('<').next().unwrap().to_owned();
    space.deploy("web", 2).unwrap();
    let binding = |external_id: &str| {
        json!({
            "apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
            "spec": {
                "targetGroup": {"arn": arn, "assumeRole": {"roleARN": role, "externalID": external_id}},
                "serviceRef": {"name": "web"},
            },
        })
    };
    space.apply(&binding(SECRET)).ok().unwrap();
    eventually(SOON, || {
        let there = server.targets("555566667777", "us-west-2", &arn);
        if there.len() == 2 { Ok(()) } else { Err(format!("{there:?}")) }
    })
    .unwrap();
    let assumed: Vec<_> =
        space.calls().into_iter().filter(|call| call.action == "AssumeRole" && call.code.is_none()).collect();
    let sessions: BTreeSet<_> =
        assumed.iter().map(|call| call.parameters["RoleSessionName"].clone()).collect();
    assert_eq!(sessions, BTreeSet::from(["tgb-demo".to_owned()]));
    // The webhook and the controller, each once.
    assert!(assumed.len() <= 2, "{assumed:?}");
    assert!(space.controller().metric("tgb_aws_calls_total", &["operation=\"AssumeRole\""]).unwrap() >= 1.0);
    assert!(!space.controller().log().contains(SECRET));
    assert!(!space.webhook().log().contains(SECRET));
}

/// The actions of a policy document.
fn actions(text: &str) -> BTreeSet<String> {
    let policy: Value = serde_json::from_str(text).unwrap();
    let statements = policy["Statement"].as_array().unwrap().iter();
    statements.flat_map(|s| s["Action"].as_array().unwrap()).map(|a| a.as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_policies_allow_what_is_called_and_nothing_else() {
    let space = World::shared()
        .unwrap()
        .prepare("policy")
        .controller("--require-target-group-tag=team")
        .controller("--health-poll=2s")
        .webhook("--require-target-group-tag=team")
        .start()
        .unwrap();
    let lab = space.aws().lab().clone();
    let lb = peer_of(&space);
    // Pods outside of all subnets, groups that only their tags tell apart, and room for one rule.
    let second = space.security_group("second", &[]).unwrap();
    let pods = space.security_group("pods", &[]).unwrap();
    let eni = space
        .seed(|aws| {
            aws.subnets
                .retain(|_, subnet| subnet.cidr.is_none_or(|cidr| !cidr.to_string().starts_with("10.244.")));
            aws.quotas.rules_per_group = 1;
            aws.enis.values_mut().for_each(|eni| eni.groups.push(second.clone()));
            let (id, group) = (aws.new_id("eni"), vec![pods.clone()]);
            let eni = Eni { id: id.clone(), vpc: lab.vpc.clone(), groups: group, ..Eni::default() };
            aws.enis.insert(id.clone(), eni);
            id
        })
        .unwrap();
    let group = || {
        let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
        let tag = [
            ("ResourceArns.member.1", arn.as_str()),
            ("Tags.member.1.Key", "team"),
            ("Tags.member.1.Value", "x"),
        ];
        space.call("AddTags", &tag).unwrap();
        space.attribute(&arn, "deregistration_delay.timeout_seconds", "1").unwrap();
        arn
    };
    let (one, two) = (group(), group());
    space.deploy("one", 1).unwrap();
    space.deploy("two", 0).unwrap();
    let annotation = json!([{"eniId": eni}]).to_string();
    let patch = json!({"spec": {"replicas": 1, "template": {"metadata": {"annotations": {"vpc.amazonaws.com/pod-eni": annotation}}}}});
    space.kubectl_with(&["patch", "deployment", "two", "-p", &patch.to_string()], "").ok().unwrap();
    let rule = |port: u16| networking(&json!([{"securityGroup": {"groupID": lb}}]), &json!([{"port": port}]));
    let opened = |port: u16| format!("tcp {port}-{port} {lb}");
    space.bind("two", &two, &rule(1000)).unwrap();
    until_ours(&space, &pods, &[&opened(1000)]);
    space.bind("one", &one, &rule(1000)).unwrap();
    until_ours(&space, &lab.node_group, &[&opened(1000)]);
    space.bind("one", &one, &rule(2000)).unwrap();
    until_ours(&space, &lab.node_group, &[&opened(2000)]);
    space.kubectl("delete tgb one two --timeout=60s").ok().unwrap();
    until_ours(&space, &lab.node_group, &[]);

    // Who we are needs no permission.
    let called_by = |user: &str| -> BTreeSet<String> {
        let calls = space.calls().into_iter().filter(|call| call.caller.ends_with(&format!("/{user}")));
        let action = |call: awsim::Call| match call.service {
            awsim::Service::Elb => format!("elasticloadbalancing:{}", call.action),
            awsim::Service::Ec2 => format!("ec2:{}", call.action),
            awsim::Service::Sts => format!("sts:{}", call.action),
        };
        calls.map(action).filter(|action| action != "sts:GetCallerIdentity").collect()
    };
    assert_eq!(called_by("CONTROLLER"), actions(include_str!("../../docs/iam-policy.json")));
    assert_eq!(called_by("WEBHOOK"), actions(include_str!("../../docs/iam-policy-webhook.json")));
}

/// `tgb-controller run` with this environment and nothing else of AWS.
fn bare_controller(space: &Space<'_>, environment: &[(&str, &str)]) -> Command {
    let kubeconfig = space.cluster().kubeconfig().display().to_string();
    let mut command = Command::new(built("tgb-controller").unwrap());
    command.args(["run", "--cluster-name=bare", "--http-listen=127.0.0.1:0", "--lease-namespace=default"]);
    command.args([format!("--kubeconfig={kubeconfig}"), format!("--lease-name={}", space.name())]);
    command.args([format!("--watch-namespaces={}", space.name()), format!("--rule-owner={}", space.name())]);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("AWS_")) {
        command.env_remove(name);
    }
    let defaults =
        [("AWS_CONFIG_FILE", "/dev/null"), ("AWS_SHARED_CREDENTIALS_FILE", "/dev/null"), ("NO_COLOR", "1")];
    command.envs(defaults).env("AWS_ENDPOINT_URL", space.aws().endpoint()).envs(environment.iter().copied());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

#[test]
fn what_is_missing_at_start_is_said_in_one_line() {
    let space = space("missing");
    let key = format!("AKIA{}BARE", space.aws().account());
    let no_metadata = ("AWS_EC2_METADATA_DISABLED", "true");
    let (region, secret) = (("AWS_REGION", "us-west-2"), ("AWS_SECRET_ACCESS_KEY", "x"));
    space.fault(Fault::new(Effect::Deny).action("GetCallerIdentity")).unwrap();
    for (environment, said) in [
        (vec![no_metadata], "no AWS region is known; give --aws-region or set AWS_REGION"),
        (vec![no_metadata, region], "no AWS credentials are found"),
        (
            vec![no_metadata, region, secret, ("AWS_ACCESS_KEY_ID", &key)],
            "AWS refuses our credentials: GetCallerIdentity: AccessDenied",
        ),
    ] {
        let output = bare_controller(&space, &environment).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let errors: Vec<&str> = text.lines().filter(|line| line.starts_with("error: ")).collect();
        assert_eq!((output.status.code(), errors.len()), (Some(1), 1), "{text}");
        assert!(errors[0].contains(said), "{text}");
        assert!(text.lines().count() <= 3, "{text}");
    }
}

#[test]
fn region_and_vpc_come_from_the_instance_metadata_service() {
    let space = space("metadata");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut line = String::new();
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            reader.read_line(&mut line).unwrap();
            let mut header = String::new();
            while reader.read_line(&mut header).is_ok_and(|_| !header.trim().is_empty()) {
                header.clear();
            }
            let body = match line.split(' ').nth(1).unwrap_or_default() {
                "/latest/api/token" => "token",
                "/latest/meta-data/placement/region" => "us-west-2",
                "/latest/meta-data/mac" => "0a:00:00:00:00:01",
                "/latest/meta-data/network/interfaces/macs/0a:00:00:00:00:01/vpc-id" => {
                    "vpc-0123456789abcdef0"
                }
                _ => "",
            };
            let status = if body.is_empty() { "404 Not Found" } else { "200 OK" };
            let head = format!(
                "x-aws-ec2-metadata-token-ttl-seconds: 21600\r\nContent-Length: {}\r\nConnection: close",
                body.len()
            );
            // the client may have gone
            let _ = write!(stream, "HTTP/1.1 {status}\r\n{head}\r\n\r\n{body}");
        }
    });
    let key = format!("AKIA{}BARE", space.aws().account());
    let environment = [
        ("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint.as_str()),
        ("AWS_ACCESS_KEY_ID", &key),
        ("AWS_SECRET_ACCESS_KEY", "x"),
    ];
    let mut controller = bare_controller(&space, &environment).stderr(Stdio::null()).spawn().unwrap();
    let searched = eventually(SOON, || {
        let calls = space.calls();
        let search =
            |call: &&awsim::Call| call.caller.ends_with("/BARE") && call.action == "DescribeSecurityGroups";
        calls.iter().find(search).cloned().ok_or("the VPC was not searched")
    });
    controller.kill().unwrap();
    controller.wait().unwrap();
    let searched = searched.unwrap();
    assert_eq!(searched.parameters["Filter.1.Value.1"], "vpc-0123456789abcdef0");
    assert_eq!(searched.region, "us-west-2");
}
