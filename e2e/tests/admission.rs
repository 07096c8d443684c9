//! Admission from the outside: what kubectl says and what is stored, on a real API server.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

use awsim::{Effect, Fault};
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tgb_e2e::{Output, Space, World, eventually};

const SOON: Duration = Duration::from_secs(60);
const VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha1"];

fn space(name: &str, flags: &[&str]) -> Space<'static> {
    let prepared = World::shared().unwrap().prepare(name);
    let space = flags.iter().fold(prepared, |prepared, flag| prepared.webhook(flag)).start().unwrap();
    // From then on region and account are held against ARNs.
    eventually(SOON, || space.webhook().log().contains("connected to AWS").then_some(()).ok_or("not yet"))
        .unwrap();
    // What is stored is admission's alone.
    space.controller().kill().unwrap();
    space
}

/// A binding of v1.
fn v1(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "elbv2.k8s.aws/v1", "kind": "TargetGroupBinding", "metadata": {"name": name}, "spec": spec})
}

/// The same in another version, as a person would write it; nothing if it has no spec to rewrite.
fn in_version(binding: &Value, version: &str) -> Option<Value> {
    let mut made = binding.clone();
    made["apiVersion"] = format!("elbv2.k8s.aws/{version}").into();
    if version == "v1" {
        return Some(made);
    }
    let spec = made["spec"].as_object_mut()?;
    let mut group = spec.remove("targetGroup")?;
    let moved = [
        ("/arn", "targetGroupARN"),
        ("/name", "targetGroupName"),
        ("/targetType", "targetType"),
        ("/protocol", "targetGroupProtocol"),
        ("/ipAddressType", "ipAddressType"),
        ("/vpcID", "vpcID"),
        ("/assumeRole/roleARN", "iamRoleArnToAssume"),
        ("/assumeRole/externalID", "assumeRoleExternalId"),
    ];
    for (from, to) in moved {
        if let Some(value) = group.pointer_mut(from) {
            spec.insert(to.to_owned(), value.take());
        }
    }
    if let Some(sharing) = group.get("sharing") {
        spec.insert("multiClusterTargetGroup".to_owned(), (sharing == "Shared").into());
    }
    Some(made)
}

/// As the path of a finding is written in a version.
fn path_in(path: &str, version: &str) -> String {
    let old = match path {
        _ if version == "v1" => return path.to_owned(),
        "spec.targetGroup" | "spec.targetGroup.arn" => "spec.targetGroupARN",
        "spec.targetGroup.name" => "spec.targetGroupName",
        "spec.targetGroup.protocol" => "spec.targetGroupProtocol",
        "spec.targetGroup.targetType" => "spec.targetType",
        "spec.targetGroup.ipAddressType" => "spec.ipAddressType",
        "spec.targetGroup.vpcID" => "spec.vpcID",
        "spec.targetGroup.sharing" => "spec.multiClusterTargetGroup",
        "spec.targetGroup.assumeRole" | "spec.targetGroup.assumeRole.roleARN" => "spec.iamRoleArnToAssume",
        "spec.targetGroup.assumeRole.externalID" => "spec.assumeRoleExternalId",
        same => same,
    };
    old.to_owned()
}

/// `kubectl apply --dry-run=server` of all of them at once.
fn try_all(space: &Space<'_>, bindings: &[Value]) -> Output {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": bindings}).to_string();
    space.kubectl_with(&["apply", "--dry-run=server", "-f", "-"], &list)
}

/// `kubectl apply` of Services: name, `spec`.
fn services(space: &Space<'_>, all: &[(&str, Value)]) {
    let made = |(name, spec): &(&str, Value)| json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec});
    let items: Vec<Value> = all.iter().map(made).collect();
    space.apply(&json!({"apiVersion": "v1", "kind": "List", "items": items})).ok().unwrap();
}

/// The end of an ARN, which is the target group's own.
fn id_of(arn: &str) -> &str {
    &arn[arn.len() - 16..]
}

fn tag(space: &Space<'_>, arn: &str, key: &str, value: &str) {
    let parameters =
        [("ResourceArns.member.1", arn), ("Tags.member.1.Key", key), ("Tags.member.1.Value", value)];
    space.call("AddTags", &parameters).unwrap();
}

fn object(space: &Space<'_>, name: &str) -> Value {
    space.kubectl(&format!("get targetgroupbindings.v1.elbv2.k8s.aws {name} -o json")).json().unwrap()
}

const ALL_PORTS_OF_A_GROUP: &str = "sg-0123456789abcdef0";

/// What a rule is tried with: its id, whether it refuses, where the finding is, what it says, and the object.
struct Case {
    rule: &'static str,
    refuses: bool,
    path: &'static str,
    says: String,
    binding: Value,
}

#[test]
fn every_rule_passes_what_is_right_and_tells_what_is_wrong_in_every_version() {
    let space = space(
        "rules",
        &[
            "--assume-role-allow=arn:aws:iam::*:role/tgb-*",
            "--require-target-group-tag=team=shop",
            "--namespace-binding-tag=namespaces",
        ],
    );
    space.kubectl("label namespace rules elbv2.k8s.aws/pod-readiness-gate-inject=enabled").ok().unwrap();
    let port = |port: u16, name: &str| json!({"name": name, "port": port, "targetPort": port + 8000});
    let app = json!({"app": "web"});
    services(
        &space,
        &[
            ("web", json!({"selector": app, "ports": [port(80, "http")]})),
            ("dns", json!({"selector": app, "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}]})),
            (
                "apart",
                json!({"selector": app, "ports": [
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 5353},
                    {"name": "dns-udp", "port": 53, "protocol": "UDP", "targetPort": 5354},
                ]}),
            ),
            ("two", json!({"selector": app, "ports": [port(80, "http"), port(90, "admin")]})),
            ("node", json!({"type": "NodePort", "selector": app, "ports": [port(80, "http")]})),
            ("bare", json!({"ports": [port(80, "http")]})),
            ("alias", json!({"type": "ExternalName", "externalName": "example.com"})),
        ],
    );
    let node_port = space.node_port("node").unwrap();
    let group = |protocol: &str, port: u16, target_type: &str, more: &[(&str, &str)]| {
        let arn = space.target_group_with(protocol, port, target_type, more).unwrap();
        tag(&space, &arn, "team", "shop");
        tag(&space, &arn, "namespaces", "other rules");
        arn
    };
    let served = |protocol: &str, port: u16, target_type: &str, more: &[(&str, &str)]| {
        let arn = group(protocol, port, target_type, more);
        space.attach(&arn).unwrap();
        arn
    };
    let ip = served("HTTP", 80, "ip", &[]);
    let instance = served("HTTP", node_port, "instance", &[]);
    let other_port = served("HTTP", 81, "instance", &[]);
    let odd_check = served("HTTP", node_port, "instance", &[("HealthCheckPort", "8081")]);
    let udp = served("UDP", 53, "ip", &[]);
    let both = served("TCP_UDP", 53, "ip", &[]);
    let v6 = group("TCP", 80, "ip", &[("IpAddressType", "ipv6")]);
    let alone = group("HTTP", 80, "ip", &[]);
    let quic = group("QUIC", 443, "ip", &[]);
    let alb = group("TCP", 80, "alb", &[]);
    let held = served("HTTP", 80, "ip", &[]);
    space.change_target("RegisterTargets", &held, "10.244.0.200:8080").unwrap();
    // A target that is an endpoint of the Service, as those of a binding that is made again.
    let own = served("HTTP", 80, "ip", &[]);
    space.change_target("RegisterTargets", &own, "10.244.0.201:8080").unwrap();
    let labels =
        json!({"kubernetes.io/service-name": "web", "endpointslice.kubernetes.io/managed-by": "nobody"});
    let slice = json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "web-own", "labels": labels}, "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": [{"addresses": ["10.244.0.201"]}]});
    space.apply(&slice).ok().unwrap();
    let taken = served("HTTP", 80, "ip", &[]);
    let untagged = space.served_target_group("HTTP", 80, "ip").unwrap();
    let closed = served("HTTP", 80, "ip", &[]);
    tag(&space, &closed, "namespaces", "rule team-a.");
    let on = |arn: &str, service: &str, port: Value| json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": service, "port": port}});
    let with = |mut spec: Value, pointer: &str, value: Value| {
        let (parent, member) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[member] = value;
        spec
    };
    let opens = |spec: Value, from: Value, ports: Value| {
        with(spec, "/networking", json!({"ingress": [{"from": from, "ports": ports}]}))
    };
    let sg = json!([{"securityGroup": {"groupID": ALL_PORTS_OF_A_GROUP}}]);
    let net = |cidr: &str| json!([{"ipBlock": {"cidr": cidr}}]);
    let role = |spec: Value, role: &str| with(spec, "/targetGroup/assumeRole", json!({"roleARN": role}));
    space.apply(&v1("first", on(&taken, "web", json!(80)))).ok().unwrap();
    // The watched list of bindings has it.
    eventually(SOON, || try_all(&space, &[v1("second", on(&taken, "web", json!(80)))]).refused()).unwrap();

    let good_ip = || on(&ip, "web", json!(80));
    let good_instance = || on(&instance, "node", json!("http"));
    let mut right: Vec<(String, Value)> = Vec::new();
    let mut accept = |name: &str, spec: Value| right.push((name.to_owned(), v1(name, spec)));
    accept("ip", good_ip());
    accept(
        "by-name",
        json!({"targetGroup": {"name": ip.split('/').nth(1).unwrap()}, "serviceRef": {"name": "web"}}),
    );
    accept("zero", on(&ip, "web", json!(0)));
    accept("made-again", on(&own, "web", json!(80)));
    accept("instance", good_instance());
    accept("udp", on(&udp, "dns", json!("dns")));
    accept("nodes", with(good_instance(), "/nodeSelector", json!({"matchLabels": {"a": "b"}})));
    accept("opened", opens(good_ip(), sg.clone(), json!([{"port": 8080}])));
    accept(
        "opened-node",
        opens(good_instance(), net("10.0.0.0/8"), json!([{"port": node_port, "protocol": "TCP"}])),
    );
    accept("all-ports", opens(good_ip(), net("10.0.0.0/8"), json!([])));
    accept("by-port-name", opens(good_ip(), sg.clone(), json!([{"port": "http"}])));
    accept("shared", with(good_ip(), "/targetGroup/sharing", json!("Shared")));
    accept("typed", with(good_ip(), "/targetGroup/targetType", json!("ip")));
    accept(
        "complete",
        with(
            with(
                with(good_ip(), "/targetGroup/protocol", json!("HTTP")),
                "/targetGroup/vpcID",
                json!(space.aws().lab().vpc),
            ),
            "/targetGroup/ipAddressType",
            json!("ipv4"),
        ),
    );
    accept("mismatch-meant", good_instance());
    right.last_mut().unwrap().1["spec"]["targetGroup"]["arn"] = json!(other_port);
    right.last_mut().unwrap().1["metadata"]["annotations"] =
        json!({"elbv2.k8s.aws/node-port-mismatch": "ignore"});

    let mut wrong: Vec<Case> = Vec::new();
    let mut find = |rule, refuses, path, says: &str, spec: Value| {
        let binding = v1(&format!("case-{}", wrong.len()), spec);
        wrong.push(Case { rule, refuses, path, says: says.to_owned(), binding });
    };
    let arn_path = "spec.targetGroup.arn";
    let port_path = "spec.serviceRef.port";
    find(
        "TGB101",
        true,
        "spec.targetGroup",
        "no target group is named",
        with(good_ip(), "/targetGroup", json!({"targetType": "ip"})),
    );
    find(
        "TGB102",
        true,
        arn_path,
        "the ARN of a load balancer",
        on(
            "arn:aws:elasticloadbalancing:us-west-2:123456789012:loadbalancer/app/web/1ce5b7da835c9ffb",
            "web",
            json!(80),
        ),
    );
    find("TGB102", true, arn_path, "is not an ARN", on("web", "web", json!(80)));
    find(
        "TGB103",
        true,
        arn_path,
        "is in region eu-west-1, the controller in us-west-2",
        on(&ip.replace("us-west-2", "eu-west-1"), "web", json!(80)),
    );
    find(
        "TGB103",
        true,
        arn_path,
        "is in partition aws-cn",
        on(&ip.replace("arn:aws:", "arn:aws-cn:"), "web", json!(80)),
    );
    find(
        "TGB104",
        true,
        arn_path,
        "is in account 999999999999",
        on(&ip.replace(space.aws().account(), "999999999999"), "web", json!(80)),
    );
    find(
        "TGB105",
        true,
        "spec.targetGroup.name",
        "other is not the target group of the ARN",
        with(good_ip(), "/targetGroup/name", json!("other")),
    );
    find(
        "TGB110",
        true,
        arn_path,
        "AWS has no target group targetgroup/",
        on(&ip.replace(&ip[ip.len() - 16..], "0000000000000000"), "web", json!(80)),
    );
    find(
        "TGB110",
        true,
        "spec.targetGroup.name",
        "AWS has no target group nobody in account",
        json!({"targetGroup": {"name": "nobody"}, "serviceRef": {"name": "web"}}),
    );
    find(
        "TGB111",
        true,
        "spec.targetGroup.targetType",
        "has targets of type ip, not instance",
        with(good_ip(), "/targetGroup/targetType", json!("instance")),
    );
    find(
        "TGB111",
        true,
        arn_path,
        "has targets of type alb, which can't be bound",
        on(&alb, "web", json!(80)),
    );
    find(
        "TGB112",
        true,
        "spec.targetGroup.ipAddressType",
        "is ipv4, not ipv6",
        with(good_ip(), "/targetGroup/ipAddressType", json!("ipv6")),
    );
    find(
        "TGB113",
        true,
        "spec.targetGroup.vpcID",
        "not in vpc-00000000",
        with(good_ip(), "/targetGroup/vpcID", json!("vpc-00000000")),
    );
    find(
        "TGB113",
        true,
        "spec.targetGroup.vpcID",
        "is not a VPC ID",
        with(good_ip(), "/targetGroup/vpcID", json!("mine")),
    );
    find(
        "TGB114",
        true,
        "spec.targetGroup.protocol",
        "has the protocol HTTP, not TCP",
        with(good_ip(), "/targetGroup/protocol", json!("TCP")),
    );
    find(
        "TGB115",
        true,
        arn_path,
        "is already bound by TargetGroupBinding rules/first; bind another",
        on(&taken, "web", json!(80)),
    );
    find("TGB116", false, arn_path, "no load balancer uses target group", on(&alone, "web", json!(80)));
    find("TGB117", false, arn_path, "health check asks port 8081", on(&odd_check, "node", json!(80)));
    find(
        "TGB118",
        false,
        "spec.targetGroup.sharing",
        "already has 1 target that this binding does not register; they stay until",
        on(&held, "web", json!(80)),
    );
    find(
        "TGB201",
        false,
        "spec.serviceRef.name",
        "Service rules/later does not exist yet",
        on(&ip, "later", json!(80)),
    );
    find(
        "TGB201",
        true,
        "spec.serviceRef.name",
        "Service rules/never does not exist, and the port",
        on(&ip, "never", json!(0)),
    );
    find(
        "TGB202",
        true,
        "spec.serviceRef.name",
        "rules/alias is an ExternalName",
        on(&ip, "alias", json!(80)),
    );
    find("TGB203", true, port_path, "write one of 80 (http), 90 (admin)", on(&ip, "two", json!(0)));
    find(
        "TGB204",
        true,
        port_path,
        "Service rules/two has no port 8080; it has 80 (http), 90 (admin)",
        on(&ip, "two", json!(8080)),
    );
    find("TGB204", true, port_path, "has no port 3000000000", on(&ip, "web", json!(3_000_000_000_u64)));
    find(
        "TGB205",
        true,
        port_path,
        "rules/web is ClusterIP, and instance targets need a nodePort",
        on(&instance, "web", json!(80)),
    );
    find(
        "TGB206",
        true,
        port_path,
        &format!("exposes port 80 (http) at nodePort {node_port}, but target group"),
        on(&other_port, "node", json!(80)),
    );
    find(
        "TGB206",
        true,
        port_path,
        &format!(
            "port 81, which no nodePort can have (30000-32767); recreate the target group with port {node_port}"
        ),
        on(&other_port, "node", json!("http")),
    );
    find(
        "TGB207",
        false,
        "spec.networking",
        &format!(
            "does not allow TCP {node_port}, the nodePort that the load balancer sends traffic and health"
        ),
        opens(good_instance(), sg.clone(), json!([{"port": 80}])),
    );
    find(
        "TGB208",
        false,
        "spec.networking",
        "does not allow TCP 8080, the pods' port that the load balancer sends traffic and health checks to",
        opens(good_ip(), sg.clone(), json!([{"port": 80}])),
    );
    find(
        "TGB208",
        false,
        "spec.networking",
        "does not allow TCP 53, the port that the load balancer sends health checks to",
        opens(on(&udp, "dns", json!(53)), sg.clone(), json!([{"port": 53, "protocol": "UDP"}])),
    );
    find(
        "TGB208",
        false,
        port_path,
        "leads TCP to targetPort 5353 and the other protocol of TCP_UDP to 5354",
        on(&both, "apart", json!(53)),
    );
    find(
        "TGB204",
        true,
        port_path,
        "rules/web has no port named \"80\"; it has 80 (http); a port in quotes is a name, so write 80 without quotes",
        on(&ip, "web", json!("80")),
    );
    find(
        "TGB204",
        true,
        port_path,
        "it has 80 (http); 8080 is the targetPort of 80 (http), so write 80",
        on(&ip, "web", json!(8080)),
    );
    find(
        "TGB204",
        true,
        port_path,
        &format!("{node_port} is the nodePort of 80 (http), so write 80"),
        on(&instance, "node", json!(node_port)),
    );
    find(
        "TGB212",
        true,
        "spec.serviceRef.name",
        "\"Web\" is not the name of a Service",
        on(&ip, "Web", json!(80)),
    );
    find(
        "TGB212",
        true,
        "spec.serviceRef.name",
        "\"web?watch=true\" is not the name of a Service",
        on(&ip, "web?watch=true", json!(0)),
    );
    find(
        "TGB212",
        true,
        "spec.targetGroup.name",
        "is not the name of a target group",
        json!({"targetGroup": {"name": "w".repeat(33)}, "serviceRef": {"name": "web"}}),
    );
    let fifty_one: Value = (0..51).map(|n| json!({"ipBlock": {"cidr": format!("10.{n}.0.0/16")}})).collect();
    find(
        "TGB308",
        true,
        "spec.networking.ingress[0].from",
        "has 51 entries, 50 are allowed",
        opens(good_ip(), fifty_one, json!([{"port": 8080}])),
    );
    find("TGB209", true, port_path, "is UDP, which does not fit", on(&ip, "dns", json!(53)));
    find("TGB209", true, port_path, "has no port that fits", on(&udp, "web", json!(0)));
    find("TGB210", true, "spec.serviceRef.name", "add IPv6 to the Service", on(&v6, "web", json!(80)));
    find("TGB211", false, "spec.serviceRef.name", "rules/bare has no selector", on(&ip, "bare", json!(80)));
    find(
        "TGB301",
        true,
        "spec.nodeSelector",
        "the targets are pods",
        with(good_ip(), "/nodeSelector", json!({"matchLabels": {"a": "b"}})),
    );
    find(
        "TGB301",
        true,
        "spec.nodeSelector",
        "needs values",
        with(good_instance(), "/nodeSelector", json!({"matchExpressions": [{"key": "a", "operator": "In"}]})),
    );
    find(
        "TGB302",
        true,
        "spec.networking.ingress[0].from[0]",
        "has both",
        opens(
            good_ip(),
            json!([{"securityGroup": {"groupID": ALL_PORTS_OF_A_GROUP}, "ipBlock": {"cidr": "10.0.0.0/8"}}]),
            json!([]),
        ),
    );
    find(
        "TGB302",
        true,
        "spec.networking.ingress[0].from[0]",
        "has neither",
        opens(good_ip(), json!([{}]), json!([])),
    );
    find(
        "TGB302",
        true,
        "spec.networking.ingress[0].from",
        "is empty",
        opens(good_ip(), json!([]), json!([])),
    );
    find(
        "TGB303",
        true,
        "spec.networking.ingress[0].from[0].ipBlock.cidr",
        "write 10.0.0.1/32",
        opens(good_ip(), net("10.0.0.1"), json!([])),
    );
    find(
        "TGB303",
        true,
        "spec.networking.ingress[0].from[0].ipBlock.cidr",
        "is not ipv4",
        opens(good_ip(), net("2001:db8::/32"), json!([])),
    );
    find(
        "TGB303",
        false,
        "spec.networking.ingress[0].from[0].ipBlock.cidr",
        "10.1.0.0/16 is used",
        opens(good_ip(), net("10.1.2.3/16"), json!([])),
    );
    find(
        "TGB304",
        true,
        "spec.networking.ingress[0].from[0].securityGroup.groupID",
        "is not a security group ID",
        opens(good_ip(), json!([{"securityGroup": {"groupID": "web"}}]), json!([])),
    );
    find(
        "TGB305",
        true,
        "spec.networking.ingress[0].ports[0].port",
        "65536 is not a port",
        opens(good_ip(), sg.clone(), json!([{"port": 65536}])),
    );
    find(
        "TGB305",
        true,
        "spec.networking.ingress[0].ports[0].port",
        "is not a port name",
        opens(good_ip(), sg.clone(), json!([{"port": "Http"}])),
    );
    find(
        "TGB305",
        true,
        "spec.networking.ingress[0].ports[0].port",
        "write the nodePort's number",
        opens(good_instance(), sg.clone(), json!([{"port": "http"}])),
    );
    find(
        "TGB306",
        false,
        "spec.networking.ingress[0].from[0].ipBlock.cidr",
        "0.0.0.0/0 opens the targets to the whole internet",
        opens(good_ip(), net("0.0.0.0/0"), json!([])),
    );
    let many: Value = (0..31).map(|n| json!({"securityGroup": {"groupID": format!("sg-{n:08x}")}})).collect();
    find(
        "TGB307",
        false,
        "spec.networking.ingress",
        "makes 62 rules of one address family",
        opens(good_ip(), many, json!([{"port": 8080}, {"port": 8081}])),
    );
    find(
        "TGB401",
        true,
        "spec.targetGroup.assumeRole",
        "use ip targets",
        with(
            role(good_instance(), "arn:aws:iam::210987654321:role/tgb-a"),
            "/targetGroup/targetType",
            json!("instance"),
        ),
    );
    find(
        "TGB401",
        true,
        "spec.targetGroup.assumeRole.roleARN",
        "is not a role ARN",
        role(good_ip(), "tgb-a"),
    );
    find(
        "TGB401",
        true,
        "spec.targetGroup.assumeRole.externalID",
        "an external id needs a role",
        with(good_ip(), "/targetGroup/assumeRole", json!({"externalID": "x"})),
    );
    find(
        "TGB402",
        true,
        "spec.targetGroup.assumeRole.roleARN",
        "may not be assumed: no pattern of the operator's matches it (--assume-role-allow)",
        role(good_ip(), "arn:aws:iam::210987654321:role/admin"),
    );
    find("TGB403", true, arn_path, "lacks the tag team=shop", on(&untagged, "web", json!(80)));
    find(
        "TGB404",
        true,
        arn_path,
        "its AWS tag \"namespaces\" lists \"rule team-a.\"; ask the owner of the target group to add rules",
        on(&closed, "web", json!(80)),
    );
    find(
        "TGB405",
        true,
        "spec.targetGroup.targetType",
        "QUIC needs ip targets",
        with(
            with(on(&quic, "dns", json!(53)), "/targetGroup/targetType", json!("instance")),
            "/targetGroup/protocol",
            json!("QUIC"),
        ),
    );
    let long = "w".repeat(64);
    let mut named = v1(&long, good_ip());
    wrong.push(Case {
        rule: "TGB107",
        refuses: true,
        path: "metadata.name",
        says: "the name has 64 characters".into(),
        binding: named.clone(),
    });
    named["metadata"]["name"] = "w".repeat(238).into();
    named["spec"] = with(good_instance(), "/targetGroup/sharing", json!("Shared"));
    wrong.push(Case {
        rule: "TGB107",
        refuses: true,
        path: "metadata.name",
        says: "the ConfigMap of a Shared binding".into(),
        binding: named,
    });

    let mut annotated = v1("annotated", good_ip());
    annotated["metadata"]["annotations"] = json!({"elbv2.k8s.aws/pausd": "true"});
    wrong.push(Case {
        rule: "TGB120",
        refuses: false,
        path: "metadata.annotations",
        says: "elbv2.k8s.aws/pausd is not an annotation of ours".into(),
        binding: annotated,
    });

    for version in VERSIONS {
        let written = |(_, binding): &(String, Value)| in_version(binding, version);
        let good: Vec<Value> = right.iter().filter_map(written).collect();
        assert!(good.len() > 8);
        let output = try_all(&space, &good);
        let said = output.stderr.clone();
        let accepted = output.ok().unwrap();
        assert_eq!(accepted.matches("created (server dry run)").count(), good.len(), "{version}: {accepted}");
        assert!(!said.contains("TGB"), "{version}: {said}");

        for refuses in [true, false] {
            let cases: Vec<(&Case, Value)> = wrong
                .iter()
                .filter(|case| case.refuses == refuses)
                .filter_map(|case| Some((case, in_version(&case.binding, version)?)))
                .collect();
            let bindings: Vec<Value> = cases.iter().map(|(_, binding)| binding.clone()).collect();
            let output = try_all(&space, &bindings);
            let created = output.stdout.matches("created (server dry run)").count();
            assert_eq!(
                created,
                if refuses { 0 } else { cases.len() },
                "{version}: {}\n{}",
                output.stdout,
                output.stderr
            );
            let lines: Vec<&str> = output.stderr.lines().collect();
            for (case, _) in &cases {
                // Of shape: a cause, which kubectl prints as `* PATH: Invalid value: …` or `PATH: …`; of policy: our line.
                let path = path_in(case.path, version);
                let is_it = |line: &&&str| {
                    line.contains(case.rule)
                        && line.contains(&case.says)
                        && line.contains(&format!("{path}: "))
                };
                let found = lines.iter().find(is_it);
                assert!(
                    found.is_some(),
                    "{version}: {} {path} {:?} is not in:\n{}",
                    case.rule,
                    case.says,
                    output.stderr
                );
            }
            for warning in lines.iter().filter_map(|line| line.strip_prefix("Warning: ")) {
                assert!(warning.chars().count() <= 256, "{warning}");
            }
        }
    }
    // Every id of docs/rules.md but those that have tests of their own.
    let elsewhere = ["TGB106", "TGB119", "TGB121", "TGB501", "TGB601"];
    let documented =
        std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rules.md")).unwrap();
    let ids = documented.lines().filter_map(|line| line.strip_prefix("## "));
    let missing: Vec<&str> =
        ids.filter(|id| !elsewhere.contains(id) && !wrong.iter().any(|case| case.rule == *id)).collect();
    assert_eq!(missing, [""; 0]);
    assert_eq!(
        space.count("RegisterTargets") + space.count("AssumeRole"),
        0,
        "nothing was changed or assumed"
    );
}

#[test]
fn a_shared_binding_is_refused_where_the_controller_may_not_write_its_config_map() {
    let space = space("unshared", &["--shared-targets-namespaces="]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let shared = v1(
        "web",
        json!({"targetGroup": {"arn": arn, "sharing": "Shared"}, "serviceRef": {"name": "web", "port": 80}}),
    );
    for (version, path) in
        [("v1", "spec.targetGroup.sharing: TGB121"), ("v1beta1", "spec.multiClusterTargetGroup: TGB121")]
    {
        let said = space.apply(&in_version(&shared, version).unwrap()).refused().unwrap();
        assert!(said.contains(path) && said.contains("add unshared to sharedTargets.namespaces"), "{said}");
        assert!(said.contains("Forbidden"), "{said}");
    }
    space.bind("web", &arn, &json!({})).unwrap();
    let patch = r#"{"spec": {"targetGroup": {"sharing": "Shared"}}}"#;
    let args = ["patch", "targetgroupbindings.v1.elbv2.k8s.aws", "web", "--type=merge", "-p", patch];
    assert!(space.kubectl_with(&args, "").refused().unwrap().contains("TGB121"));
    space.webhook().restart_with(&["--shared-targets-namespaces=*"]).unwrap();
    space.webhook().until_ready(SOON).unwrap();
    eventually(SOON, || space.kubectl_with(&args, "").ok()).unwrap();
}

#[test]
fn an_update_is_held_against_what_it_changes_and_nothing_else() {
    let space = space("updates", &[]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let (arn, other) =
        (space.served_target_group("HTTP", 80, "ip").unwrap(), space.target_group("HTTP", 80, "ip").unwrap());
    let shared = |arn: &str| json!({"targetGroup": {"arn": arn, "sharing": "Shared"}, "serviceRef": {"name": "web", "port": 80}});
    space.apply(&v1("web", shared(&arn))).ok().unwrap();
    let patched = |version: &str, patch: Value| {
        let resource = format!("targetgroupbindings.{version}.elbv2.k8s.aws");
        let patch = json!({"spec": patch}).to_string();
        space.kubectl_with(&["patch", &resource, "web", "--type=merge", "--dry-run=server", "-p", &patch], "")
    };
    // TGB106, field by field and in the version's words.
    for (version, patch, path, from_to) in [
        ("v1", json!({"targetGroup": {"arn": other}}), "spec.targetGroup.arn", id_of(&arn)),
        (
            "v1",
            json!({"targetGroup": {"targetType": "instance"}}),
            "spec.targetGroup.targetType",
            "from ip to instance",
        ),
        ("v1", json!({"targetGroup": {"protocol": "TCP"}}), "spec.targetGroup.protocol", "from HTTP to TCP"),
        ("v1beta1", json!({"ipAddressType": "ipv6"}), "spec.ipAddressType", "from ipv4 to ipv6"),
        ("v1beta1", json!({"vpcID": "vpc-00000000"}), "spec.vpcID", "to vpc-00000000"),
        ("v1alpha1", json!({"targetGroupARN": other}), "spec.targetGroupARN", id_of(&other)),
    ] {
        let said = patched(version, patch).refused().unwrap();
        let line = said.lines().find(|line| line.contains("TGB106")).unwrap_or_else(|| panic!("{said}"));
        assert!(line.contains(&format!("{path}: ")) && line.contains(from_to), "{line}");
    }
    // To nothing is back to what it was: D7.
    patched("v1", json!({"targetGroup": {"protocol": null}})).ok().unwrap();
    // TGB119: others have targets there.
    space.change_target("RegisterTargets", &arn, "10.244.0.200:8080").unwrap();
    let said = patched("v1beta1", json!({"multiClusterTargetGroup": false})).refused().unwrap();
    assert!(
        said.contains("spec.multiClusterTargetGroup: TGB119 the target group has 1 target of others"),
        "{said}"
    );
    space.change_target("DeregisterTargets", &arn, "10.244.0.200:8080").unwrap();
    eventually(SOON, || patched("v1beta1", json!({"multiClusterTargetGroup": false})).ok()).unwrap();

    // A change of annotations alone is never refused, and told of where it does nothing.
    let annotate = |annotation: &str| {
        let output = space.kubectl(&format!("annotate tgb web {annotation} --overwrite --dry-run=server"));
        let said = output.stderr.clone();
        output.ok().unwrap();
        said
    };
    let said = annotate("elbv2.k8s.aws/on-delete=keep");
    assert!(said.contains("Warning: metadata.annotations: TGB120 \"keep\" is not a value of"), "{said}");
    let said = annotate("elbv2.k8s.aws/pausd=true");
    assert!(said.contains("TGB120 elbv2.k8s.aws/pausd is not an annotation of ours"), "{said}");
    assert_eq!(annotate("elbv2.k8s.aws/paused=true") + &annotate("example.com/pausd=true"), "");

    // The Service loses the port that the binding names: it stays editable where no rule looks at it …
    space
        .kubectl_with(
            &[
                "patch",
                "service",
                "web",
                "--type=json",
                "-p",
                r#"[{"op": "replace", "path": "/spec/ports/0", "value": {"name": "new", "port": 81}}]"#,
            ],
            "",
        )
        .ok()
        .unwrap();
    space.kubectl("annotate tgb web note=a").ok().unwrap();
    let sg = json!({"ingress": [{"from": [{"securityGroup": {"groupID": ALL_PORTS_OF_A_GROUP}}]}]});
    patched("v1", json!({"networking": sg})).ok().unwrap();
    // … and is told where one does.
    let said = patched("v1", json!({"serviceRef": {"port": 82}})).refused().unwrap();
    assert!(
        said.contains("spec.serviceRef.port: TGB204 Service updates/web has no port 82; it has 81 (new)"),
        "{said}"
    );
    let said = patched("v1", json!({"serviceRef": {"port": 3_000_000_000_u64}})).refused().unwrap();
    assert!(said.contains("TGB204"), "{said}");
    // A target group that was deleted and made anew under its name.
    let name = arn.split('/').nth(1).unwrap().to_owned();
    let anew = arn.replace(&arn[arn.len() - 16..], "00000000000000aa");
    space
        .seed(|aws| {
            let mut group = aws.target_groups.remove(&arn).unwrap();
            group.arn = anew.as_str().into();
            aws.target_groups.insert(anew.as_str().into(), group);
        })
        .unwrap();
    let said = patched("v1", json!({"targetGroup": {"arn": anew.replace("aa", "bb")}})).refused().unwrap();
    assert!(said.contains("TGB106") && said.contains("TGB110"), "{said}");
    patched("v1", json!({"targetGroup": {"arn": anew, "name": name}})).ok().unwrap();
}

/// Lets both reviews look at `operations` only, and waits until the API server does so.
fn review_only(space: &Space<'_>, operations: &[&str]) {
    let patch = json!([{"op": "replace", "path": "/webhooks/0/rules/0/operations", "value": operations}]);
    for kind in ["mutatingwebhookconfiguration", "validatingwebhookconfiguration"] {
        let (name, patch) = (format!("tgb-{}", space.name()), patch.to_string());
        space.kubectl_with(&["patch", kind, &name, "--type=json", "-p", &patch], "").ok().unwrap();
    }
    let nowhere = "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb";
    let probe =
        v1("probe", json!({"targetGroup": {"arn": nowhere}, "serviceRef": {"name": "web", "port": 80}}));
    eventually(SOON, || {
        let output = try_all(space, std::slice::from_ref(&probe));
        if operations.contains(&"CREATE") { output.refused() } else { output.ok() }
    })
    .unwrap();
}

#[test]
fn an_object_that_nobody_completed_stays_editable_when_an_edit_completes_it() {
    let space = space("uncompleted", &[]);
    let both = json!([{"name": "http", "port": 80}, {"name": "admin", "port": 90}]);
    services(&space, &[("web", json!({"selector": {"app": "web"}, "ports": both}))]);
    let (arn, vpc) = (space.served_target_group("HTTP", 80, "ip").unwrap(), space.aws().lab().vpc.clone());
    // As an old release of LBC stored it: without address type, VPC and protocol, and with a network of the other family.
    let ingress =
        json!([{"from": [{"ipBlock": {"cidr": "fd00::/8"}}], "ports": [{"protocol": "TCP", "port": 80}]}]);
    let old = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
        "spec": {"targetGroupARN": arn, "targetType": "ip", "serviceRef": {"name": "web", "port": 80},
            "networking": {"ingress": ingress}}});
    review_only(&space, &["UPDATE"]);
    space.apply(&old).ok().unwrap();
    review_only(&space, &["CREATE", "UPDATE"]);
    let patched = |patch: Value| {
        let patch = json!({"spec": patch}).to_string();
        let args =
            ["patch", "targetgroupbindings.v1beta1.elbv2.k8s.aws", "web", "--type=merge", "-p", &patch];
        space.kubectl_with(&args, "")
    };
    // What somebody writes, or admission fills in, where there was nothing is no change …
    let said = patched(json!({"ipAddressType": "ipv6", "vpcID": "mine"})).refused().unwrap();
    assert!(said.contains("* spec.ipAddressType: TGB112") && said.contains("* spec.vpcID: TGB113"), "{said}");
    patched(json!({"serviceRef": {"port": 90}})).ok().unwrap();
    let spec = object(&space, "web")["spec"].take();
    assert_eq!(
        spec["targetGroup"],
        json!({"arn": arn, "targetType": "ip", "protocol": "HTTP", "ipAddressType": "ipv4", "vpcID": vpc})
    );
    assert_eq!(spec["serviceRef"]["port"], 90);
    // … and where a rule looks, it does.
    let said = patched(json!({"networking": {"ingress": [{"from": [], "ports": [{"port": 0}]}]}}))
        .refused()
        .unwrap();
    assert!(said.contains("TGB305 0 is not a port") && said.contains("TGB302"), "{said}");
}

#[test]
fn a_service_that_cannot_be_read_is_told_and_no_port_is_left_out_for_it() {
    let space = space("unread", &[]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let role = format!("tgb-{}-webhook", space.name());
    let allowed = space.kubectl(&format!("get clusterrole {role} -o json")).json().unwrap()["rules"].take();
    let may = |rules: Value| {
        let patch = json!([{"op": "replace", "path": "/rules", "value": rules}]).to_string();
        space.kubectl_with(&["patch", "clusterrole", &role, "--type=json", "-p", &patch], "").ok().unwrap();
    };
    let others = allowed.as_array().unwrap().iter().filter(|rule| rule["resources"] != json!(["services"]));
    may(others.cloned().collect());
    // With what it has seen of Services so far it would go on.
    space.webhook().kill().unwrap();
    space.webhook().restart().unwrap();
    space.webhook().until_ready(SOON).unwrap();
    let bare = v1("web", json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": "web"}}));
    let reason = "services \"web\" is forbidden";
    // Nobody knows the port: the server's own failure, so that failurePolicy decides.
    eventually(SOON, || {
        let said = try_all(&space, std::slice::from_ref(&bare)).undecided()?;
        let wanted = "Service unread/web can't be read, and the port can only be filled in from it: services";
        if said.contains(wanted) && said.contains("is forbidden") { Ok(()) } else { Err(said) }
    })
    .unwrap();
    // What is refused anyway is refused with all that is known.
    let mut wrong = bare.clone();
    wrong["spec"]["targetGroup"]["protocol"] = json!("TCP");
    let said = try_all(&space, &[wrong]).refused().unwrap();
    assert!(said.contains("TGB114") && said.contains(reason), "{said}");
    let mut complete = bare.clone();
    complete["spec"]["serviceRef"]["port"] = json!(8080);
    let output = try_all(&space, &[complete]);
    let said = output.stderr.clone();
    output.ok().unwrap();
    let wanted =
        format!("Warning: spec.serviceRef: not checked, since Service unread/web can't be read: {reason}");
    assert!(said.contains(&wanted), "{said}");
    // As soon as it may again, it does.
    may(allowed);
    eventually(SOON, || space.apply(&bare).ok()).unwrap();
    assert_eq!(object(&space, "web")["spec"]["serviceRef"]["port"], 80);
}

#[test]
fn what_is_left_out_is_filled_in_once_and_applying_again_moves_nothing() {
    let space = space("defaults", &[]);
    services(
        &space,
        &[(
            "web",
            json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
        )],
    );
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let name = arn.split('/').nth(1).unwrap();
    let bare = v1("web", json!({"targetGroup": {"name": name}, "serviceRef": {"name": "web"}}));
    space.apply(&bare).ok().unwrap();
    let stored = object(&space, "web");
    assert_eq!(
        stored["spec"],
        json!({
            "targetGroup": {"name": name, "arn": arn, "targetType": "ip", "protocol": "HTTP", "ipAddressType": "ipv4",
                "vpcID": space.aws().lab().vpc},
            "serviceRef": {"name": "web", "port": 80},
        })
    );
    let same = |what: &str, version: bool| {
        let now = object(&space, "web");
        assert_eq!(now["spec"], stored["spec"], "{what}");
        assert_eq!(now["metadata"]["generation"], 1, "{what}");
        if version {
            assert_eq!(now["metadata"]["resourceVersion"], stored["metadata"]["resourceVersion"], "{what}");
        }
    };
    for _ in 0..2 {
        assert!(space.apply(&bare).ok().unwrap().contains("unchanged"));
        same("apply", true);
    }
    let replace =
        |manifest: &Value| space.kubectl_with(&["replace", "-f", "-"], &manifest.to_string()).ok().unwrap();
    replace(&bare);
    same("replace", false);
    for version in ["v1beta1", "v1alpha1"] {
        let mut old = in_version(&bare, version).unwrap();
        old["spec"]["serviceRef"]["port"] = 0.into();
        replace(&old);
        // LBC's port of zero is a missing one, which is filled in; nothing else differs.
        same(version, false);
    }
    let server_side = |version: &str| {
        let manifest = in_version(&bare, version).unwrap().to_string();
        let args = ["apply", "--server-side", "--force-conflicts", "--field-manager=gitops", "-f", "-"];
        space.kubectl_with(&args, &manifest).ok().unwrap();
        object(&space, "web")["metadata"]["resourceVersion"].clone()
    };
    for version in VERSIONS {
        let first = server_side(version);
        same("server-side apply", false);
        assert_eq!(server_side(version), first, "{version}: a second server-side apply moves nothing");
    }
    // Each is tried against a binding that is complete: nothing is asked of AWS.
    space.server().unwrap().clear_journal(Some(space.aws().account()));
    assert!(space.apply(&bare).ok().unwrap().contains("configured") || space.calls().is_empty());
    assert_eq!(space.calls(), []);
    // D7 takes no ARN along to another name, and no port to another Service.
    let renamed = v1("web", json!({"targetGroup": {"name": "other"}, "serviceRef": {"name": "web"}}));
    let said = space.kubectl_with(&["replace", "-f", "-"], &renamed.to_string()).refused().unwrap();
    assert!(said.contains("TGB110 AWS has no target group other") && said.contains("TGB106"), "{said}");
    let moved = v1("web", json!({"targetGroup": {"name": name}, "serviceRef": {"name": "api"}}));
    let said = space.kubectl_with(&["replace", "-f", "-"], &moved.to_string()).refused().unwrap();
    assert!(said.contains("TGB201 Service defaults/api does not exist, and the port"), "{said}");
    // A name that is generated is no name yet.
    let mut generated = bare.clone();
    generated["metadata"] = json!({"generateName": "web-"});
    let said = space.kubectl_with(&["create", "-f", "-"], &generated.to_string()).refused().unwrap();
    assert!(said.contains("is already bound by TargetGroupBinding defaults/web"), "{said}");
}

#[test]
fn nothing_that_a_user_writes_beside_the_spec_switches_rules_or_defaulting_off() {
    let space = space("beside", &[]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let (free, taken) = (
        space.served_target_group("HTTP", 80, "ip").unwrap(),
        space.served_target_group("HTTP", 80, "ip").unwrap(),
    );
    let by_name = |name: &str, arn: &str| {
        let group = arn.split('/').nth(1).unwrap();
        v1(name, json!({"targetGroup": {"name": group}, "serviceRef": {"name": "web"}}))
    };
    space.apply(&by_name("first", &taken)).ok().unwrap();
    let tried = |binding: &Value| {
        let args = ["create", "--dry-run=server", "--validate=false", "-o", "json", "-f", "-"];
        space.kubectl_with(&args, &binding.to_string())
    };
    eventually(SOON, || tried(&by_name("second", &taken)).refused()).unwrap();
    for (pointer, value) in [
        ("/status", json!({"targets": {"registered": "x"}})),
        ("/status", json!([])),
        ("/status", json!({"targets": 7, "conditions": "none"})),
        ("/metadata/deletionTimestamp", json!("2026-01-02T03:04:05Z")),
    ] {
        let with = |mut binding: Value| {
            let (parent, member) = pointer.rsplit_once('/').unwrap();
            binding.pointer_mut(parent).unwrap()[member] = value.clone();
            binding
        };
        let made = tried(&with(by_name("new", &free))).json().unwrap();
        assert_eq!(made["spec"]["targetGroup"]["arn"], free.as_str(), "{pointer} {value}");
        assert_eq!(made["spec"]["serviceRef"]["port"], 80, "{pointer} {value}");
        let said = tried(&with(by_name("new", &taken))).refused().unwrap();
        assert!(said.contains("mtargetgroupbinding") && said.contains("TGB115"), "{pointer} {value}: {said}");
    }
}

#[test]
fn another_name_in_a_manifest_by_name_is_a_change_of_the_target_group() {
    let space = space("renamed", &[]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let groups = [
        space.served_target_group("HTTP", 80, "ip").unwrap(),
        space.served_target_group("HTTP", 80, "ip").unwrap(),
    ];
    for (version, binding) in [("v1", "a"), ("v1beta1", "b")] {
        let [one, other] = [&groups[0], &groups[1]].map(|arn| {
            let name = arn.split('/').nth(1).unwrap();
            let group = json!({"name": name, "sharing": "Shared"});
            in_version(&v1(binding, json!({"targetGroup": group, "serviceRef": {"name": "web"}})), version)
                .unwrap()
        });
        space.apply(&one).ok().unwrap();
        let said = space.apply(&other).refused().unwrap();
        // Invalid, so that `--force` and GitOps tools make it again.
        assert!(said.contains("is invalid"), "{version}: {said}");
        assert!(said.contains("TGB106 can't change from renamed-0 to renamed-1"), "{version}: {said}");
        assert!(!said.contains("TGB105"), "{version}: {said}");
        let manifest = other.to_string();
        let forced = space.kubectl_with(&["apply", "--force", "--timeout=60s", "-f", "-"], &manifest);
        forced.ok().unwrap();
        assert_eq!(object(&space, binding)["spec"]["targetGroup"]["arn"], groups[1].as_str());
    }
}

#[test]
fn a_manifest_of_any_length_is_answered_briefly_and_says_where_to_read_on() {
    let space = space("lengthy", &[]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let tried = |version: &str, spec: Value| {
        let binding = in_version(&v1("web", spec), version).unwrap();
        let args = ["create", "--dry-run=server", "--validate=false", "-f", "-"];
        space.kubectl_with(&args, &binding.to_string()).refused().unwrap()
    };
    let spec = |ingress: Value| {
        json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": "web", "port": 80},
            "networking": {"ingress": ingress}})
    };
    let peers = |n: usize| vec![json!({}); n];
    let names = |n: usize| {
        let mut spec = spec(json!([]));
        spec["targetGroup"] = json!({"name": "n".repeat(n)});
        spec["serviceRef"]["name"] = "s".repeat(n).into();
        spec
    };
    for version in VERSIONS {
        let said = tried(version, spec(json!([{"from": peers(300_000)}])));
        assert!(said.contains("TGB308 has 300000 entries, 50 are allowed"), "{version}: {said:.2000}");
        assert!(said.contains("see docs/rules.md#tgb308"), "{version}: {said:.2000}");
        assert!(said.len() < 2000, "{version}: {} bytes", said.len());
        let said =
            tried(version, spec(json!((0..50).map(|_| json!({"from": peers(50)})).collect::<Vec<_>>())));
        assert_eq!(said.matches("TGB302 has neither").count(), 50, "{version}: {said}");
        assert!(said.contains("and 2450 more; see docs/rules.md#tgb302"), "{version}: {said}");
        let said = tried(version, names(1_000_000));
        assert!(said.contains("TGB212") && said.len() < 2000, "{version}: {said:.2000}");
    }
    assert!(!format!("{:?}", space.calls()).contains("nnnn"), "a name that can't be one is not asked about");
    // A finding of policy: where to read on is the end of it.
    let said = tried("v1", json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": "web", "port": 81}}));
    assert!(said.trim_end().ends_with("; see docs/rules.md#tgb204"), "{said}");
}

#[test]
fn one_apply_asks_aws_once_and_what_is_known_is_not_asked_again() {
    let space = space("frugal", &[]);
    services(&space, &[("web", json!({"selector": {"app": "web"}, "ports": [{"port": 80}]}))]);
    let calls = || {
        let mut all: Vec<String> = space.calls().into_iter().map(|call| call.action).collect();
        all.retain(|action| action != "GetCallerIdentity");
        space.server().unwrap().clear_journal(Some(space.aws().account()));
        all
    };
    let binding = |name: &str, arn: &str, sharing: &str| {
        v1(name, json!({"targetGroup": {"arn": arn, "sharing": sharing}, "serviceRef": {"name": "web"}}))
    };
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    calls();
    space.apply(&binding("a", &arn, "Shared")).ok().unwrap();
    assert_eq!(calls(), ["DescribeTargetGroups"]);
    space.apply(&binding("b", &arn, "Shared")).ok().unwrap();
    assert_eq!(calls(), [""; 0], "the group is known");
    let second = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.apply(&binding("c", &second, "Exclusive")).ok().unwrap();
    let mut asked = calls();
    asked.sort();
    assert_eq!(asked, ["DescribeTargetGroups", "DescribeTargetHealth"], "TGB118 counts targets");
    // Many at once are one question.
    let third = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.fault(Fault::new(Effect::Latency { ms: 700 }).action("DescribeTargetGroups")).unwrap();
    std::thread::scope(|scope| {
        for n in 0..8 {
            let (space, binding) = (&space, binding(&format!("many-{n}"), &third, "Shared"));
            scope.spawn(move || space.apply(&binding).ok().unwrap());
        }
    });
    space.clear_faults().unwrap();
    assert_eq!(calls(), ["DescribeTargetGroups"]);
    // That something is missing is not remembered.
    let by_name = v1(
        "late",
        json!({"targetGroup": {"name": "frugal-3", "sharing": "Shared"}, "serviceRef": {"name": "web"}}),
    );
    assert!(space.apply(&by_name).refused().unwrap().contains("TGB110"));
    let fourth = space.served_target_group("HTTP", 80, "ip").unwrap();
    assert!(fourth.contains("/frugal-3/"));
    space.apply(&by_name).ok().unwrap();
    // A Service that was made a moment ago by the same file.
    let file = format!(
        "{}\n---\n{}",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "new"}, "spec": {"selector": {"app": "web"}, "ports": [{"port": 81}]}}),
        v1(
            "new",
            json!({"targetGroup": {"arn": fourth, "sharing": "Shared"}, "serviceRef": {"name": "new"}})
        )
    );
    space.apply(&file).ok().unwrap();
    assert_eq!(object(&space, "new")["spec"]["serviceRef"]["port"], 81);
}

#[test]
fn aws_that_does_not_answer_holds_up_nothing_that_is_complete() {
    let space = space("unanswered", &[]);
    services(&space, &[("web", json!({"selector": {"app": "web"}, "ports": [{"port": 80}]}))]);
    let vpc = space.aws().lab().vpc.clone();
    let made = |arn: &str, complete: bool| {
        let mut group = json!({"arn": arn, "sharing": "Shared"});
        if complete {
            group = json!({"arn": arn, "sharing": "Shared", "targetType": "ip", "protocol": "HTTP", "ipAddressType": "ipv4", "vpcID": vpc});
        }
        v1("web", json!({"targetGroup": group, "serviceRef": {"name": "web", "port": 80}}))
    };
    let tried = |name: &str, effect: &Effect, part: &str, refuse: bool| {
        let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
        space.fault(Fault::new(effect.clone()).action("DescribeTargetGroups").contains(&arn)).unwrap();
        let begun = Instant::now();
        let (complete, bare) = std::thread::scope(|scope| {
            let space = &space;
            let apply = |binding: Value| move || try_all(space, &[binding]);
            let (a, b) = (scope.spawn(apply(made(&arn, true))), scope.spawn(apply(made(&arn, false))));
            (a.join().unwrap(), b.join().unwrap())
        });
        assert!(begun.elapsed() < Duration::from_secs(15), "{name}: {:?}", begun.elapsed());
        let said = bare.refused().unwrap();
        assert!(
            said.contains("TGB601 could not complete the manifest from AWS") && said.contains(part),
            "{name}: {said}"
        );
        let said = complete.stderr.clone();
        assert!(
            said.contains("spec.targetGroup.arn: TGB601 not checked against AWS: ") && said.contains(part),
            "{name}: {said}"
        );
        if refuse {
            complete.refused().unwrap();
        } else {
            complete.ok().unwrap();
        }
    };
    let effects = [
        ("slow", Effect::Latency { ms: 30_000 }, "in time"),
        ("denying", Effect::Deny, "AccessDenied"),
        ("unreachable", Effect::Reset, "DescribeTargetGroups"),
    ];
    std::thread::scope(|scope| {
        for (name, effect, part) in &effects {
            scope.spawn(|| tried(name, effect, part, false));
        }
    });
    // It slows down all that is asked of this account.
    tried("throttling", &Effect::Throttle, "hrottl", false);
    space.clear_faults().unwrap();
    // What is stored and does not touch the target group needs no AWS at all.
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let mut stored = made(&arn, false);
    stored["metadata"]["name"] = json!("stored");
    space.apply(&stored).ok().unwrap();
    space.fault(Fault::new(Effect::Deny)).unwrap();
    let patch = r#"{"spec": {"networking": {"ingress": [{"from": [{"securityGroup": {"groupID": "sg-0123456789abcdef0"}}]}]}}}"#;
    let output = space.kubectl_with(&["patch", "tgb", "stored", "--type=merge", "-p", patch], "");
    assert!(!output.stderr.contains("TGB601"), "{}", output.stderr);
    output.ok().unwrap();
    space.clear_faults().unwrap();
    let flags = ["--aws-unavailable=deny"];
    space.webhook().restart_with(&flags).unwrap();
    space.webhook().until_ready(SOON).unwrap();
    tried("denying, strictly", &Effect::Deny, "AccessDenied", true);
    // And back: AWS answers, nothing is left of it.
    space.clear_faults().unwrap();
    let output = try_all(&space, &[made(&space.served_target_group("HTTP", 80, "ip").unwrap(), false)]);
    assert!(!output.stderr.contains("TGB"), "{}", output.stderr);
    output.ok().unwrap();
}

#[test]
fn pods_get_gates_and_server_ids_and_changes_of_services_are_told() {
    let world = World::shared().unwrap();
    let prepared = world.prepare("pods").with_readiness_gates();
    let space = prepared.label("elbv2.k8s.aws/quic-server-id-inject", "enabled").start().unwrap();
    space.controller().kill().unwrap();
    let service = |more: Value| {
        let mut spec = json!({"type": "NodePort", "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    services(&space, &[("web", service(json!({}))), ("free", service(json!({})))]);
    let node_port = space.node_port("web").unwrap();
    let ip = space.served_target_group("HTTP", 80, "ip").unwrap();
    let instance = space.served_target_group("HTTP", node_port, "instance").unwrap();
    space.bind("web", &ip, &json!({})).unwrap();
    let on_nodes =
        v1("nodes", json!({"targetGroup": {"arn": instance}, "serviceRef": {"name": "web", "port": "http"}}));
    space.apply(&on_nodes).ok().unwrap();
    let pod = |name: &str, app: &str, annotations: Value| {
        json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": app}, "annotations": annotations},
            "spec": {"containers": [{"name": "web", "image": "web"}, {"name": "side", "image": "side"}],
                "readinessGates": [{"conditionType": "example.com/other"}]}})
    };
    let injected = |pod: &Value| {
        space.kubectl_with(&["create", "--dry-run=server", "-o", "json", "-f", "-"], &pod.to_string()).json()
    };
    // Bindings whose Service is gone cost nobody else a gate.
    let shared = space.served_target_group("HTTP", 80, "ip").unwrap();
    let dead = |n: usize| {
        let group = json!({"arn": shared, "sharing": "Shared"});
        v1(
            &format!("dead-{n}"),
            json!({"targetGroup": group, "serviceRef": {"name": format!("gone-{n}"), "port": 80}}),
        )
    };
    let dead: Vec<Value> = (0..40).map(dead).collect();
    space.apply(&json!({"apiVersion": "v1", "kind": "List", "items": dead})).ok().unwrap();
    // A gate for the binding with ip targets, beside those that are there; the other Service's pods get none.
    eventually(SOON, || {
        let gates = injected(&pod("a", "web", json!({})))?["spec"]["readinessGates"].clone();
        let wanted = json!([{"conditionType": "example.com/other"}, {"conditionType": "target-health.elbv2.k8s.aws/web"}]);
        if gates == wanted { Ok(()) } else { Err(gates.to_string()) }
    })
    .unwrap();
    assert_eq!(
        injected(&pod("b", "other", json!({}))).unwrap()["spec"]["readinessGates"].as_array().unwrap().len(),
        1
    );
    // Server ids, each container its own.
    let named = json!({"service.beta.kubernetes.io/aws-load-balancer-quic-enabled-containers": "web,side"});
    let made = injected(&pod("c", "web", named)).unwrap();
    let id = |n: usize| made["spec"]["containers"][n]["env"][0].clone();
    assert_eq!(id(0)["name"], "AWS_LBC_QUIC_SERVER_ID");
    assert_eq!(id(0)["value"].as_str().unwrap().len(), 12, "8 bytes in base64");
    assert_ne!(id(0)["value"], id(1)["value"]);
    assert_eq!(made["spec"]["containers"][0]["env"].as_array().unwrap().len(), 1);
    let without = injected(&pod("d", "web", json!({}))).unwrap();
    assert_eq!(without["spec"]["containers"][0].get("env"), None);

    // TGB501 names who would lose what.
    let told = |service: &str, patch: Value| {
        let args = ["patch", "service", service, "--type=json", "--dry-run=server", "-p", &patch.to_string()];
        let output = space.kubectl_with(&args, "");
        let said = output.stderr.clone();
        output.ok().unwrap();
        said
    };
    let replace = |path: &str, value: Value| json!([{"op": "replace", "path": path, "value": value}]);
    let other_port = json!({"name": "new", "port": 81, "targetPort": 8080});
    for (patch, parts) in [
        (
            replace("/spec/ports/0", other_port.clone()),
            [
                "spec.ports: TGB501 TargetGroupBinding nodes uses port 80 (http), which goes away",
                "TargetGroupBinding web uses port 80",
            ],
        ),
        (
            replace("/spec/selector", Value::Null),
            [
                "spec.selector: TGB501 TargetGroupBinding nodes",
                "TargetGroupBinding web uses this Service, which will select no pods",
            ],
        ),
        (
            replace("/spec/selector/app", json!("api")),
            [
                "spec.selector: TGB501 TargetGroupBinding nodes",
                "TargetGroupBinding web uses this Service, which will select none of its present pods (app=api instead of app=web)",
            ],
        ),
        (
            replace("/spec/ports/0/nodePort", json!(node_port ^ 1)),
            ["TGB501 TargetGroupBinding nodes uses nodePort", &format!("which becomes {}", node_port ^ 1)],
        ),
        (
            replace("/spec/ports/0/protocol", json!("UDP")),
            [
                "TGB501 TargetGroupBinding nodes uses port 80 (http), which becomes UDP",
                "TargetGroupBinding web uses port 80 (http), which becomes UDP and does not fit the target group's protocol HTTP",
            ],
        ),
        (
            replace("/spec/type", json!("ClusterIP")),
            ["TGB501 TargetGroupBinding nodes uses nodePort", "which goes away"],
        ),
    ] {
        let said = told("web", patch);
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?} is not in: {said}");
    }
    assert_eq!(told("free", replace("/spec/ports/0", other_port.clone())), "");
    assert_eq!(told("web", json!([{"op": "add", "path": "/metadata/labels", "value": {"a": "b"}}])), "");
    let narrower = json!([{"op": "add", "path": "/spec/selector/tier", "value": "front"}]);
    assert_eq!(told("web", narrower), "", "it may select the same pods");
    let deleted = space.kubectl("delete service web --dry-run=server");
    assert!(
        deleted
            .stderr
            .contains("TGB501 TargetGroupBinding web uses this Service; its targets will be deregistered"),
        "{}",
        deleted.stderr
    );

    // Nobody waits for a webhook that is down: not what is none of its business, and not clean-up.
    space
        .kubectl_with(
            &[
                "patch",
                "tgb",
                "web",
                "--type=merge",
                "-p",
                r#"{"metadata": {"finalizers": ["example.com/held"]}}"#,
            ],
            "",
        )
        .ok()
        .unwrap();
    space.webhook().kill().unwrap();
    space.kubectl_with(&["create", "-f", "-"], &pod("e", "web", json!({})).to_string()).ok().unwrap();
    let moved = replace("/spec/ports/0", other_port).to_string();
    space.kubectl_with(&["patch", "service", "free", "--type=json", "-p", &moved], "").ok().unwrap();
    space.kubectl("delete service free").ok().unwrap();
    space.kubectl("label tgb web team=a").ok().unwrap();
    space.kubectl("annotate tgb web note=a").ok().unwrap();
    let late = v1("late", json!({"targetGroup": {"arn": ip}, "serviceRef": {"name": "web"}}));
    let said = space.apply(&late).undecided().unwrap();
    assert!(said.contains("failed calling webhook"), "{said}");
    space.kubectl("delete tgb web --wait=false").ok().unwrap();
    space
        .kubectl_with(
            &["patch", "tgb", "web", "--type=merge", "-p", r#"{"metadata": {"finalizers": null}}"#],
            "",
        )
        .ok()
        .unwrap();
    space.kubectl("delete tgb nodes --timeout=60s").ok().unwrap();
    space.kubectl("wait --for=delete tgb/web --timeout=60s").ok().unwrap();
}

#[test]
fn the_operator_sets_rules_apart_and_softens_policy_and_no_foreign_role_is_assumed() {
    let space = space(
        "settings",
        &["--rules=TGB204=warn,TGB306=off,TGB116=deny", "--assume-role-allow=arn:aws:iam::*:role/tgb-*"],
    );
    services(
        &space,
        &[(
            "web",
            json!({"type": "NodePort", "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}),
        )],
    );
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    let unserved = space.target_group("HTTP", 80, "ip").unwrap();
    let node_port = space.node_port("web").unwrap();
    let instance = space.served_target_group("HTTP", node_port ^ 1, "instance").unwrap();
    let open = json!({"ingress": [{"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}]});
    let binding = |arn: &str, port: Value| json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": "web", "port": port}});
    let said = |output: Output, refused: bool| {
        let text = output.stderr.clone();
        if refused {
            drop(output.refused().unwrap())
        } else {
            drop(output.ok().unwrap())
        };
        text
    };
    let mut spec = binding(&arn, json!(8080));
    spec["networking"] = open;
    let text = said(try_all(&space, &[v1("web", spec)]), false);
    assert!(text.contains("Warning: spec.serviceRef.port: TGB204") && !text.contains("TGB306"), "{text}");
    let text = said(try_all(&space, &[v1("web", binding(&unserved, json!(80)))]), true);
    assert!(text.contains("TGB116"), "{text}");
    // node-port-mismatch, by annotation.
    let mut mismatch = v1("web", binding(&instance, json!("http")));
    let text = said(try_all(&space, &[mismatch.clone()]), true);
    assert!(
        text.contains(&format!("TGB206 Service settings/web exposes port 80 (http) at nodePort {node_port}")),
        "{text}"
    );
    mismatch["metadata"]["annotations"] = json!({"elbv2.k8s.aws/node-port-mismatch": "warn"});
    let text = said(try_all(&space, &[mismatch.clone()]), false);
    assert!(text.contains("Warning: spec.serviceRef.port: TGB206"), "{text}");
    mismatch["metadata"]["annotations"] = json!({"elbv2.k8s.aws/node-port-mismatch": "ignore"});
    assert_eq!(said(try_all(&space, &[mismatch.clone()]), false), "");

    // Roles: one that is not allowed is never assumed, not even to fill something in; one that is, is.
    let foreign = space.served_target_group("HTTP", 80, "ip").unwrap();
    let assume = |role: &str, group: Value| {
        let mut spec = binding(&foreign, json!(80));
        spec["targetGroup"] = group;
        spec["targetGroup"]["assumeRole"] = json!({"roleARN": role, "externalID": "secret-of-the-shop"});
        v1("foreign", spec)
    };
    let role = format!("arn:aws:iam::{}:role/tgb-shop", space.aws().account());
    let (denied, server) = (role.replace("tgb-shop", "admin"), space.server().unwrap());
    for arn in [&role, &denied] {
        let trusts = vec!["*".to_owned()];
        server.add_role(awsim::Role {
            arn: arn.clone(),
            trusts,
            external_id: Some("secret-of-the-shop".into()),
            max_duration: 0,
        });
    }
    let by_name = json!({"name": foreign.split('/').nth(1).unwrap()});
    for group in [json!({"arn": foreign}), by_name.clone()] {
        let text = said(try_all(&space, &[assume(&denied, group)]), true);
        assert!(text.contains("TGB402") && text.contains("may not be assumed: no pattern"), "{text}");
    }
    assert_eq!(space.count("AssumeRole"), 0);
    assert_eq!(said(try_all(&space, &[assume(&role, by_name)]), false), "");
    assert_eq!(space.count("AssumeRole"), 1);
    assert!(!space.webhook().log().contains("secret-of-the-shop"));

    // What was found is counted by rule and outcome.
    let counted = |rule: &str, outcome: &str| {
        let labels = [format!("rule=\"{rule}\""), format!("outcome=\"{outcome}\"")];
        space
            .webhook()
            .metric("tgb_findings_total", &labels.iter().map(String::as_str).collect::<Vec<_>>())
            .unwrap()
    };
    assert_eq!((counted("TGB402", "refused"), counted("TGB204", "warned")), (2.0, 1.0));

    // --enforce=warn: policy only warns, shape still refuses.
    space.webhook().restart_with(&["--enforce=warn", "--rules="]).unwrap();
    space.webhook().until_ready(SOON).unwrap();
    let text = said(try_all(&space, &[v1("web", binding(&arn, json!(8080)))]), false);
    assert!(text.contains("Warning: spec.serviceRef.port: TGB204"), "{text}");
    let mut both = binding(&arn, json!(8080));
    both["networking"] = json!({"ingress": [{"from": []}]});
    let text = said(try_all(&space, &[v1("web", both)]), true);
    assert!(text.contains("TGB302") && text.contains("Warning: spec.serviceRef.port: TGB204"), "{text}");
}

/// The webhook's memory limit in the chart, in MiB.
fn chart_memory_limit() -> u32 {
    let values = concat!(env!("CARGO_MANIFEST_DIR"), "/../charts/targetgroupbinding/values.yaml");
    let values = std::fs::read_to_string(values).unwrap();
    let webhook = values.split_once("\nwebhook:\n").unwrap().1;
    let limit = webhook.split_once("limits: {memory: ").unwrap().1.split_once("Mi}").unwrap().0;
    limit.parse().unwrap()
}

#[test]
fn whoever_misbehaves_holds_up_nobody_else_and_ends_nothing() {
    let space = World::shared().unwrap().space("hostile").unwrap();
    let log = space.webhook().log();
    let https =
        log.split_once("https=Some(").and_then(|(_, rest)| rest.split_once(')')).unwrap().0.to_owned();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/hostile.py");
    let python = space.cluster().programs().python("python");
    let limit = chart_memory_limit();
    let mut command = std::process::Command::new(python);
    let output = command.args([script, &https, space.webhook().http(), &limit.to_string()]).output().unwrap();
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{text}{errors}");
    println!("{text}");
    let seen: Value = serde_json::from_str(&text).unwrap();
    for (what, codes) in seen["bad"].as_object().unwrap() {
        assert_eq!(*codes, json!([400, 400, 400, 400]), "{what}");
    }
    assert_eq!(seen["unknown_path"], 404);
    assert_eq!((&seen["deep_object"], &seen["deep_conversion"]), (&json!(200), &json!([200, "Failure"])));
    assert_eq!(seen["too_large"], json!([413, 413]));
    assert!(seen["too_large_in_pieces"] != 200 && seen["large_headers"] != 200);
    for (meanwhile, slowest) in seen["others_ms"].as_object().unwrap() {
        assert!(slowest.as_f64().is_some_and(|ms| ms < 3000.0), "{meanwhile}: {seen}");
    }
    assert!(seen["slow_headers_cut_after_s"].as_f64().is_some_and(|seconds| seconds < 20.0), "{seen}");
    // The connection that is kept was never closed. Half of the reviews, since the machine may be busy with others.
    for (meanwhile, took) in seen["kept_ms"].as_object().unwrap() {
        assert!(took[0].as_f64().is_some_and(|ms| ms < 100.0), "{meanwhile}: {seen}");
        assert!(took[2].as_f64().is_some_and(|ms| ms < 3000.0), "{meanwhile}: {seen}");
    }
    assert_eq!(seen["conversions"], json!([200, 200, 400]), "{seen}");
    let codes =
        |what: &str| seen[what].as_array().unwrap().iter().map(|seen| seen[0].clone()).collect::<Vec<_>>();
    for what in ["300000_peers", "3_mb_of_names"] {
        assert_eq!(codes(what), [200, 200], "{what}: {seen}");
    }
    assert_eq!(seen["1000_names_of_1_mb"], json!([200]));
    // Half of what the chart gives it.
    assert!(seen["memory_mib"]["at most"].as_f64().is_some_and(|mib| 2.0 * mib < f64::from(limit)), "{seen}");
    assert_eq!(seen["5000_objects_come_back"], true);
    // It still is the same process, and the API server's connections work.
    assert_eq!(space.webhook().log().matches("listening").count(), 1);
    space.deploy("web", 0).unwrap();
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space.bind("web", &arn, &json!({})).unwrap();
}

#[test]
fn lint_knows_files_the_cluster_and_aws_and_writes_sarif_that_is_valid() {
    let space = space("linted", &[]);
    services(
        &space,
        &[("web", json!({"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]}))],
    );
    let arn = space.served_target_group("HTTP", 80, "ip").unwrap();
    space
        .apply(&v1("stored", json!({"targetGroup": {"arn": arn}, "serviceRef": {"name": "web"}})))
        .ok()
        .unwrap();
    // What was right once and is no longer.
    let moved = r#"[{"op": "replace", "path": "/spec/ports/0/port", "value": 81}]"#;
    space.kubectl_with(&["patch", "service", "web", "--type=json", "-p", moved], "").ok().unwrap();

    let file = space.cluster().dir().join("lint me.yaml");
    let manifest = format!(
        "# {}\n---\napiVersion: elbv2.k8s.aws/v1beta1\nkind: TargetGroupBinding\nmetadata:\n  name: new\n  namespace: linted\nspec:\n  \
         targetGroupARN: {arn}\n  targetGroupProtocol: TCP\n  targetType: ip\n  serviceRef:\n    name: web\n    port: 8080\n",
        "x".repeat(5)
    );
    std::fs::write(&file, manifest).unwrap();
    let file = file.display().to_string();
    let program = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("tgb-webhook");
    let kubeconfig = format!("--kubeconfig={}", space.cluster().kubeconfig().display());
    let lint = |args: &[&str]| {
        let mut command = std::process::Command::new(&program);
        command.arg("lint").args(args).envs(space.aws().environment("USER"));
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
    };
    let (code, said, _) = lint(&[&file]);
    assert_eq!((code, said.as_str()), (0, ""), "alone it is in order");
    let (code, said, _) = lint(&["--cluster", &kubeconfig, "--aws", &file]);
    let wanted = [
        format!(
            "{file}:9: error: spec.targetGroupARN: TGB115 target group linted-0 is already bound by TargetGroupBinding linted/stored"
        ),
        format!(
            "{file}:10: error: spec.targetGroupProtocol: TGB114 target group linted-0 has the protocol HTTP, not TCP"
        ),
        format!(
            "{file}:14: error: spec.serviceRef.port: TGB204 Service linted/web has no port 8080; it has 81 (http)"
        ),
    ];
    assert_eq!(code, 1);
    for line in &wanted {
        assert!(said.lines().any(|each| each.starts_with(line)), "{line} is not in:\n{said}");
    }
    // What is set to nothing is not set, as where it serves.
    let empty = ["--rules=", "--assume-role-allow=", &file];
    assert_eq!(lint(&empty), (0, String::new(), "1 bindings checked: 0 errors, 0 warnings\n".to_owned()));
    for rules in ["--rules=TGB999=off", "--rules=TGB204=no", "--rules=TGB501=deny"] {
        assert_eq!(lint(&[rules, &file]).0, 2, "{rules}");
        let served = tgb_e2e::run_program("tgb-webhook", &["serve", rules], "").unwrap();
        assert_eq!((served.code, served.stderr.lines().count()), (2, 1), "{}", served.stderr);
    }
    // What the controller enforces can't be softened where it would be told otherwise a moment later.
    for rules in ["--rules=TGB402=off", "--rules=TGB212=warn", "--rules=TGB306=off,TGB115=warn"] {
        assert_eq!(lint(&[rules, &file]).0, 0, "{rules}");
        let served = tgb_e2e::run_program("tgb-webhook", &["serve", rules], "").unwrap();
        assert_eq!((served.code, served.stderr.lines().count()), (2, 1), "{}", served.stderr);
        assert!(served.stderr.contains("see docs/rules.md#tgb"), "{}", served.stderr);
    }
    let (code, said, told) = lint(&["--cluster", "--all", &kubeconfig]);
    assert_eq!(code, 1, "{said}{told}");
    let stored = "cluster: linted/stored: error: spec.serviceRef.port: TGB204 Service linted/web has no port 80; it has 81 (http)";
    assert!(said.lines().any(|line| line.starts_with(stored)), "{said}");

    let broken = space.cluster().dir().join("broken.yaml");
    std::fs::write(&broken, "a: [").unwrap();
    let broken = broken.display().to_string();
    let (code, sarif, _) =
        lint(&["--cluster", "--all", &kubeconfig, "--aws", "--output=sarif", &file, &broken]);
    assert_eq!(code, 2, "unusable input");
    let log: Value = serde_json::from_str(&sarif).unwrap();
    let results = log["runs"][0]["results"].as_array().unwrap();
    assert!(results.iter().any(|each| each["locations"][0]["physicalLocation"]["region"]["startLine"] == 14));
    assert!(
        results
            .iter()
            .any(|each| each["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] == "linted/stored")
    );
    let path = space.cluster().dir().join("lint.sarif");
    std::fs::write(&path, sarif).unwrap();
    let check = "import json, sys; from sarif_kit.validate import validation_errors; print(validation_errors(json.load(open(sys.argv[1]))))";
    let python = space.cluster().programs().python("python");
    let output = std::process::Command::new(python).args(["-c", check]).arg(path).output().unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "[]\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Values that fit somewhere and nowhere else.
fn probes() -> Vec<Value> {
    vec![
        json!("web"),
        json!(""),
        json!("8080"),
        json!(5),
        json!(-1),
        json!(80.0),
        json!(1.5),
        json!(4_000_000_000_u64),
        json!(true),
        Value::Null,
        json!([]),
        json!([null]),
        json!(["web"]),
        json!({}),
        json!({"future": 1}),
    ]
}

/// A binding for every constraint of a schema that it breaks, and some that just keep it: `put` places a value where
/// `present` was.
fn mutations(schema: &Value, present: &Value, put: &dyn Fn(Option<Value>) -> Value, out: &mut Vec<Value>) {
    out.push(put(None));
    let mut tried = probes();
    let bound =
        |key: &str| schema.get(key).and_then(Value::as_u64).map(|bound| usize::try_from(bound).unwrap());
    for length in [bound("minLength"), bound("maxLength")].into_iter().flatten() {
        // The API server counts characters, not bytes.
        let texts = (length.saturating_sub(1)..=length + 1).map(|length| "é".repeat(length));
        tried.extend(texts.map(Value::from));
    }
    for limit in ["minimum", "maximum"].iter().filter_map(|key| schema.get(*key)?.as_i64()) {
        tried.extend((limit - 1..=limit + 1).map(Value::from));
    }
    for word in schema.get("enum").and_then(Value::as_array).into_iter().flatten() {
        tried.extend([word.clone(), word.as_str().unwrap().to_lowercase().into()]);
    }
    if let (Some(most), Some(first)) = (bound("maxItems"), present.get(0)) {
        tried.extend([vec![first.clone(); most].into(), vec![first.clone(); most + 1].into()]);
    }
    if let Some(members) = present.as_object() {
        let mut more = members.clone();
        more.insert("future".to_owned(), json!({"a": [1.5]}));
        tried.push(more.into());
    }
    out.extend(tried.into_iter().map(|value| put(Some(value))));
    for (key, member) in present.as_object().into_iter().flatten() {
        let below =
            schema.pointer(&format!("/properties/{key}")).or_else(|| schema.get("additionalProperties"));
        let within = |value: Option<Value>| {
            let mut whole = present.clone();
            let members = whole.as_object_mut().unwrap();
            match value {
                Some(value) => members.insert(key.clone(), value),
                None => members.remove(key),
            };
            put(Some(whole))
        };
        mutations(below.unwrap_or_else(|| panic!("{key} is unknown")), member, &within, out);
    }
    for (index, item) in present.as_array().into_iter().flatten().enumerate() {
        let within = |value: Option<Value>| {
            let mut whole = present.clone();
            let items = whole.as_array_mut().unwrap();
            match value {
                Some(value) => items[index] = value,
                None => drop(items.remove(index)),
            }
            put(Some(whole))
        };
        mutations(&schema["items"], item, &within, out);
    }
}

#[test]
fn lint_refuses_offline_what_the_api_server_refuses_and_its_schema_nothing_else() {
    let cluster = &World::shared().unwrap().cluster;
    // Nobody's namespace: only the definition and the conversion stand between kubectl and etcd.
    cluster.namespace("schemas", &std::collections::BTreeMap::new()).unwrap();
    let crd =
        cluster.kubectl(&["get", "crd", "targetgroupbindings.elbv2.k8s.aws", "-o", "json"]).json().unwrap();
    let arn = "arn:aws:elasticloadbalancing:us-west-2:123456789012:targetgroup/web/1ce5b7da835c9ffb";
    let common = json!({"arn": arn, "name": "web", "protocol": "HTTP", "ipAddressType": "ipv4", "vpcID": "vpc-0123456789abcdef0", "sharing": "Shared"});
    let with = |base: &Value, more: Value| {
        let mut made = base.clone();
        made.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        made
    };
    let role = json!({"targetType": "ip", "assumeRole": {"roleARN": "arn:aws:iam::123456789012:role/tgb", "externalID": "x"}});
    let peers =
        json!([{"securityGroup": {"groupID": ALL_PORTS_OF_A_GROUP}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]);
    let networking = json!({"ingress": [{"from": peers, "ports": [{"protocol": "TCP", "port": 8080}]}]});
    let selector = json!({"matchLabels": {"a": "b"}, "matchExpressions": [{"key": "c", "operator": "In", "values": ["d"]}]});
    let service = json!({"name": "web", "port": 80});
    let bases = [
        json!({"targetGroup": with(&common, role), "serviceRef": service, "networking": networking}),
        json!({"targetGroup": with(&common, json!({"targetType": "instance"})), "serviceRef": service, "nodeSelector": selector}),
    ];
    // What rules of several fields refuse; the first base each time.
    let ip = |pointer: &str, value: Value| {
        let mut spec = bases[0].clone();
        let (parent, member) = pointer.rsplit_once('/').unwrap();
        spec.pointer_mut(parent).unwrap()[member] = value;
        spec
    };
    let by_rules = [
        ip("/nodeSelector", json!({})),
        ip("/targetGroup/assumeRole", json!({"externalID": "x"})),
        ip("/targetGroup/targetType", json!("instance")),
        ip("/targetGroup", json!({"targetType": "ip"})),
        with(&bases[1], json!({"targetGroup": {"arn": arn, "targetType": "instance", "protocol": "QUIC"}})),
        with(
            &bases[1],
            json!({"targetGroup": {"arn": arn, "targetType": "instance"},
            "networking": {"ingress": [{"from": peers, "ports": [{"port": "http"}]}]}}),
        ),
        ip("/networking/ingress/0/from/0/ipBlock", json!({"cidr": "10.0.0.0/8"})),
        ip("/networking/ingress/0/from", json!([])),
        ip("/networking/ingress/0/ports/0/port", json!(65_536)),
    ];

    let check = |version: &str| {
        let schema =
            crd["spec"]["versions"].as_array().unwrap().iter().find(|each| each["name"] == version).unwrap();
        let schema = &schema["schema"]["openAPIV3Schema"]["properties"]["spec"];
        let written = |spec: &Value| in_version(&v1("m", spec.clone()), version);
        let mut objects = Vec::new();
        for mut binding in bases.iter().filter_map(written) {
            let spec = binding["spec"].take();
            let put = |spec: Option<Value>| {
                let mut made = binding.clone();
                match spec {
                    Some(spec) => made["spec"] = spec,
                    None => drop(made.as_object_mut().unwrap().remove("spec")),
                }
                made
            };
            mutations(schema, &spec, &put, &mut objects);
        }
        objects.extend(by_rules.iter().filter_map(written));
        let named = ["Web", "web_1", "-web", ".web", "web..a", "1.web", &"w".repeat(253), &"w".repeat(254)];
        let of_name = |name: &&str| {
            let mut made = written(&bases[0]).unwrap();
            made["metadata"]["name"] = (*name).into();
            made
        };
        let names: Vec<Value> = named.iter().map(of_name).collect();
        for (n, object) in objects.iter_mut().enumerate() {
            object["metadata"]["name"] = format!("m-{n}").into();
        }
        objects.extend(names);
        assert!(objects.len() > 300, "{version}: {}", objects.len());

        let list = json!({"apiVersion": "v1", "kind": "List", "items": objects}).to_string();
        let args = ["-n", "schemas", "create", "--dry-run=server", "--validate=false", "-f", "-"];
        let answer = cluster.kubectl_with(&args, &list);
        let accepted: std::collections::BTreeSet<&str> = answer
            .stdout
            .lines()
            .filter_map(|line| {
                line.strip_prefix("targetgroupbinding.elbv2.k8s.aws/")?
                    .strip_suffix(" created (server dry run)")
            })
            .collect();

        let dir = cluster.dir().join("schemas").join(version);
        std::fs::create_dir_all(&dir).unwrap();
        for (n, object) in objects.iter().enumerate() {
            std::fs::write(dir.join(format!("{n:04}.json")), object.to_string()).unwrap();
        }
        let dir = dir.display().to_string();
        // All of one target group: no fault of theirs here.
        let args = ["lint", "--output=json", "--rules=TGB115=off", &dir];
        let linted = tgb_e2e::run_program("tgb-webhook", &args, "").unwrap();
        assert_eq!(linted.code, 1, "{}", linted.stderr);
        let linted: Value = serde_json::from_str(&linted.stdout).unwrap();
        let (mut differ, mut refused) = (Vec::new(), 0);
        for (n, object) in objects.iter().enumerate() {
            let file = format!("{dir}/{n:04}.json");
            let errors: Vec<&Value> = linted["findings"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|found| found["file"] == file.as_str() && found["severity"] == "error")
                .collect();
            let accepts = accepted.contains(object["metadata"]["name"].as_str().unwrap());
            refused += usize::from(!accepts);
            let of_schema = errors.iter().any(|error| error["rule"] == "schema");
            if (!accepts && errors.is_empty()) || (accepts && of_schema) {
                let verb = if accepts { "accepts" } else { "refuses" };
                differ.push(format!("the API server {verb} {object}\nlint: {errors:?}"));
            }
        }
        assert!(differ.is_empty(), "{version}: {}\n{}", differ.len(), differ.join("\n"));
        assert!(refused > 200, "{version}: {refused}");
        // No rule of the schema is left out.
        fn messages<'a>(schema: &'a Value, out: &mut Vec<&'a str>) {
            let rules = schema.get("x-kubernetes-validations").and_then(Value::as_array);
            out.extend(rules.into_iter().flatten().filter_map(|rule| rule["message"].as_str()));
            schema
                .as_object()
                .into_iter()
                .flat_map(|members| members.values())
                .for_each(|below| messages(below, out));
        }
        let mut rules = Vec::new();
        messages(schema, &mut rules);
        let untried: Vec<&&str> = rules.iter().filter(|message| !answer.stderr.contains(**message)).collect();
        assert!(untried.is_empty(), "{version}: {untried:?}");
    };
    std::thread::scope(|scope| {
        for version in VERSIONS {
            let check = &check;
            scope.spawn(move || check(version));
        }
    });
}

/// Whether everything of a value is in another one, lists in full.
fn holds(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, member)| whole.get(key).is_some_and(|whole| holds(whole, member)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len() && whole.iter().zip(part).all(|(whole, part)| holds(whole, part))
        }
        _ => whole == part,
    }
}

#[test]
fn manifests_of_every_release_line_of_lbc_are_taken_and_mean_the_same_in_v1() {
    let space = space("releases", &["--assume-role-allow=*"]);
    let app = json!({"app": "web"});
    services(
        &space,
        &[
            ("web", json!({"selector": app, "ports": [{"name": "http", "port": 80, "targetPort": 8080}]})),
            ("node", json!({"type": "NodePort", "selector": app, "ports": [{"name": "http", "port": 80}]})),
            ("dns", json!({"selector": app, "ports": [{"port": 53, "protocol": "UDP"}]})),
        ],
    );
    let (account, vpc) = (space.aws().account().to_owned(), space.aws().lab().vpc.clone());
    let (arn, trusts) = (format!("arn:aws:iam::{account}:role/tgb"), vec!["*".to_owned()]);
    space.server().unwrap().add_role(awsim::Role { arn, trusts, external_id: None, max_duration: 0 });
    let node_port = space.node_port("node").unwrap().to_string();
    // As JSON, without any look at the cluster.
    let parsed = |text: &str| -> Vec<Value> {
        let args = ["create", "--dry-run=client", "--validate=false", "-o", "json", "-f", "-"];
        let said = space.kubectl_with(&args, text).ok().unwrap();
        serde_json::Deserializer::from_str(&said).into_iter::<Value>().map(Result::unwrap).collect()
    };
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("lbc/manifests");
    let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| !path.to_string_lossy().ends_with(".v1.yaml"));
    assert!(files.len() >= 9);
    let (mut old, mut new) = (String::new(), String::new());
    for file in files {
        for (file, all) in [(file.clone(), &mut old), (file.with_extension("v1.yaml"), &mut new)] {
            let text = std::fs::read_to_string(file).unwrap();
            // The cluster has IPv4 only.
            for document in text.split("---\n").filter(|document| !document.contains("ipv6")) {
                all.push_str(&format!("---\n{document}"));
            }
        }
    }
    let of_account =
        |text: String| text.replace("123456789012", &account).replace("vpc-0123456789abcdef0", &vpc);
    let (mut old, mut new) = (of_account(old), of_account(new));
    for binding in parsed(&old) {
        let (name, spec) = (binding["metadata"]["name"].as_str().unwrap(), &binding["spec"]);
        let protocol = spec["targetGroupProtocol"].as_str().unwrap_or("HTTP");
        let on_nodes = spec["serviceRef"]["name"] == "node";
        let made = space
            .call(
                "CreateTargetGroup",
                &[
                    ("Name", name),
                    ("Protocol", protocol),
                    ("Port", if on_nodes { &node_port } else { "80" }),
                    ("TargetType", if on_nodes { "instance" } else { "ip" }),
                    ("VpcId", &vpc),
                ],
            )
            .unwrap();
        let id = made.split_once(&format!("targetgroup/{name}/")).unwrap().1.split('<').next().unwrap();
        for text in [&mut old, &mut new] {
            *text = text.replace(&format!("{name}/1ce5b7da835c9ffb"), &format!("{name}/{id}"));
        }
    }

    let (sent, meant) = (parsed(&old), parsed(&new));
    let created = space.apply(&old).ok().unwrap();
    assert_eq!(created.lines().filter(|line| line.ends_with(" created")).count(), sent.len(), "{created}");
    assert!(sent.len() >= 15);
    let stored = |version: &str| -> Vec<Value> {
        let list = space.kubectl(&format!("get targetgroupbindings.{version}.elbv2.k8s.aws -o json"));
        list.json().unwrap()["items"].as_array().cloned().unwrap()
    };
    let are_there = |when: &str| {
        for (version, wanted) in [("v1alpha1", &sent), ("v1beta1", &sent), ("v1", &meant)] {
            let all = stored(version);
            assert_eq!(all.len(), sent.len());
            for wanted in wanted {
                let found =
                    all.iter().find(|each| each["metadata"]["name"] == wanted["metadata"]["name"]).unwrap();
                assert!(
                    holds(&found["spec"], &wanted["spec"]),
                    "{when}, {version}: {found}\nlacks some of {wanted}"
                );
                assert_eq!(found["metadata"]["generation"], 1, "{when}, {version}: {found}");
            }
        }
    };
    are_there("after the first apply");
    let again = space.apply(&old).ok().unwrap();
    assert_eq!(again.lines().filter(|line| line.ends_with(" unchanged")).count(), sent.len(), "{again}");
    // Rewritten in git, and applied over it.
    let file = space.cluster().dir().join("releases.yaml");
    std::fs::write(&file, &old).unwrap();
    let file = file.display().to_string();
    tgb_e2e::run_program("tgb-webhook", &["convert", "--to=v1", "--in-place", &file], "")
        .unwrap()
        .ok()
        .unwrap();
    assert!(!std::fs::read_to_string(&file).unwrap().contains("elbv2.k8s.aws/v1beta1"));
    space.kubectl(&format!("apply -f {file}")).ok().unwrap();
    are_there("after the converted manifests");
}
