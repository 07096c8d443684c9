//! Every rule with a case that it lets pass and one that it finds.

use super::*;
use crate::arn::TargetGroupArn;
use crate::service::ServicePort;
use crate::target_group::TargetGroup;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

const ARN: &str = "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb";
const ROLE: &str = "arn:aws:iam::210987654321:role/tgb-shop";

/// A binding with everything it needs around it, in which each case changes what it is about.
struct Case {
    operation: Operation,
    name: String,
    spec: Value,
    annotations: Value,
    old: Option<Value>,
    old_status: Value,
    service: Lookup<Service>,
    target_group: Lookup<TargetGroup>,
    named: Lookup<TargetGroup>,
    tags: Option<BTreeMap<String, String>>,
    registered: Option<usize>,
    others: Vec<Other>,
    injects: Option<bool>,
    settings: Settings,
}

fn target_group() -> TargetGroup {
    TargetGroup {
        arn: TargetGroupArn::parse(ARN).unwrap(),
        target_type: "ip".into(),
        protocol: "HTTP".into(),
        ip_address_type: "ipv4".into(),
        vpc_id: Some("vpc-0123456789abcdef0".into()),
        port: Some(30080),
        health_check_port: Some("traffic-port".into()),
        load_balancer_arns: vec!["arn:lb".into()],
    }
}

fn port(number: u16, name: &str, protocol: &str) -> ServicePort {
    ServicePort {
        name: Some(name.into()),
        port: number,
        protocol: protocol.into(),
        target_port: Some(IntOrString::Int(8000 + i32::from(number))),
        node_port: Some(30000 + number),
    }
}

fn service() -> Service {
    Service {
        namespace: "shop".into(),
        name: "web".into(),
        service_type: "NodePort".into(),
        ports: vec![port(80, "http", "TCP"), port(53, "dns", "UDP")],
        selector: Some([("app".to_owned(), "web".to_owned())].into()),
        ip_families: vec!["IPv4".into()],
        ..Default::default()
    }
}

fn ip() -> Case {
    Case {
        operation: Operation::Create,
        name: "web".into(),
        spec: json!({
            "targetGroup": {"arn": ARN, "targetType": "ip", "protocol": "HTTP", "ipAddressType": "ipv4",
                "vpcID": "vpc-0123456789abcdef0"},
            "serviceRef": {"name": "web", "port": 80}
        }),
        annotations: json!({}),
        old: None,
        old_status: Value::Null,
        service: Lookup::Found(service()),
        target_group: Lookup::Found(target_group()),
        named: Lookup::Unknown,
        tags: None,
        registered: Some(0),
        others: vec![],
        injects: Some(true),
        settings: Settings {
            region: Some("eu-west-1".into()),
            partition: Some("aws".into()),
            account: Some("123456789012".into()),
            ..Default::default()
        },
    }
}

fn instance() -> Case {
    let mut case = ip();
    case.spec["targetGroup"]["targetType"] = "instance".into();
    case.aws().target_type = "instance".into();
    case
}

/// An update of `ip` that changes nothing yet.
fn update() -> Case {
    let mut case = ip();
    case.operation = Operation::Update;
    case.old = Some(case.spec.clone());
    case
}

impl Case {
    fn aws(&mut self) -> &mut TargetGroup {
        let Lookup::Found(group) = &mut self.target_group else { panic!("no target group") };
        group
    }

    fn svc(&mut self) -> &mut Service {
        let Lookup::Found(service) = &mut self.service else { panic!("no Service") };
        service
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn set(self, pointer: &str, value: Value) -> Self {
        self.with(|case| {
            let (parent, member) = pointer.rsplit_once('/').unwrap();
            case.spec.pointer_mut(parent).unwrap()[member] = value;
        })
    }

    fn without(self, pointer: &str) -> Self {
        self.with(|case| {
            let (parent, member) = pointer.rsplit_once('/').unwrap();
            case.spec.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(member);
        })
    }

    fn opens(self, from: Value, ports: Value) -> Self {
        self.set("/networking", json!({"ingress": [{"from": from, "ports": ports}]}))
    }

    fn check(&self) -> Vec<Finding> {
        fn borrow<T>(lookup: &Lookup<T>) -> Lookup<&T> {
            match lookup {
                Lookup::Unknown => Lookup::Unknown,
                Lookup::Missing => Lookup::Missing,
                Lookup::Found(value) => Lookup::Found(value),
            }
        }
        let parse = |spec: &Value, status: &Value| -> TargetGroupBinding {
            let mut object = json!({"spec": spec,
                "metadata": {"name": self.name, "namespace": "shop", "annotations": self.annotations}});
            if !status.is_null() {
                object["status"] = status.clone();
            }
            serde_json::from_value(object).unwrap()
        };
        let old = self.old.as_ref().map(|spec| parse(spec, &self.old_status));
        let context = Context {
            service: borrow(&self.service),
            target_group: borrow(&self.target_group),
            named: borrow(&self.named),
            tags: self.tags.as_ref(),
            registered: self.registered,
            others: Some(&self.others),
            injects: self.injects,
        };
        check(self.operation, &parse(&self.spec, &Value::Null), old.as_ref(), &context, &self.settings)
    }
}

fn tags(tags: &[(&str, &str)]) -> Option<BTreeMap<String, String>> {
    Some(tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
}

fn other(sharing: Sharing) -> Vec<Other> {
    vec![Other { namespace: "ops".into(), name: "old".into(), sharing }]
}

fn sg() -> Value {
    json!([{"securityGroup": {"groupID": "sg-0123456789abcdef0"}}])
}

fn cidr(text: &str) -> Value {
    json!([{"ipBlock": {"cidr": text}}])
}

fn port_80() -> Value {
    json!([{"port": 8080}])
}

fn quic(case: Case) -> Case {
    case.set("/targetGroup/protocol", "QUIC".into())
        .with(|c| {
            c.aws().protocol = "QUIC".into();
            c.aws().port = Some(30053);
        })
        .set("/serviceRef/port", 53.into())
}

/// (rule, a case that it lets pass, a case that it finds, severity, a part of what is said)
fn table() -> Vec<(&'static str, Case, Case, Severity, &'static str)> {
    use Severity::{Deny, Warn};
    let long = "w".repeat(64);
    let v6 = |case: Case| {
        case.set("/targetGroup/ipAddressType", "ipv6".into())
            .with(|c| c.aws().ip_address_type = "ipv6".into())
    };
    let role = |case: Case| {
        case.set("/targetGroup/assumeRole", json!({"roleARN": ROLE}))
            .with(|c| c.settings.assume_role_allow = vec!["arn:aws:iam::*:role/tgb-*".into()])
    };
    let tagged = |case: Case, value: &str| {
        let value = value.to_owned();
        case.with(|c| {
            c.settings.namespace_tag = Some("namespaces".into());
            c.tags = tags(&[("namespaces", &value)]);
        })
    };
    vec![
        (
            "TGB101",
            ip().without("/targetGroup/arn").set("/targetGroup/name", "web".into()),
            ip().set("/targetGroup/arn", "".into()),
            Deny,
            "spec.targetGroup: ",
        ),
        (
            "TGB102",
            ip(),
            ip().set(
                "/targetGroup/arn",
                "arn:aws:elasticloadbalancing:eu-west-1:123456789012:loadbalancer/app/web/1ce5b7da835c9ffb"
                    .into(),
            ),
            Deny,
            "load balancer",
        ),
        (
            "TGB103",
            ip(),
            ip().set("/targetGroup/arn", ARN.replace("eu-west-1", "eu-west-2").into()),
            Deny,
            "region eu-west-2, the controller in eu-west-1",
        ),
        (
            "TGB103",
            ip(),
            ip().with(|c| c.settings.partition = Some("aws-cn".into())),
            Deny,
            "partition aws, the controller in aws-cn",
        ),
        (
            "TGB104",
            role(ip()).with(|c| c.settings.account = Some("210987654321".into())),
            ip().with(|c| c.settings.account = Some("210987654321".into())),
            Deny,
            "set assumeRole",
        ),
        (
            "TGB105",
            ip().set("/targetGroup/name", "web".into()),
            ip().set("/targetGroup/name", "api".into()),
            Deny,
            "api is not the target group of the ARN, which is web",
        ),
        (
            "TGB106",
            update().set("/serviceRef/port", "http".into()),
            update().set("/targetGroup/arn", ARN.replace("web", "api").into()),
            Deny,
            "can't change from",
        ),
        (
            "TGB106",
            update().with(|c| c.old.as_mut().unwrap()["targetGroup"]["protocol"] = "TCP".into()),
            update().set("/targetGroup/protocol", "TCP".into()),
            Deny,
            "from HTTP to TCP",
        ),
        (
            "TGB106",
            update().with(|c| {
                c.old.as_mut().unwrap()["targetGroup"].as_object_mut().unwrap().remove("vpcID");
            }),
            update().without("/targetGroup/vpcID"),
            Deny,
            "to nothing",
        ),
        ("TGB107", ip(), ip().with(|c| c.name = long.clone()), Deny, "64 characters"),
        (
            "TGB107",
            instance().with(|c| c.name = long.clone()),
            ip().with(|c| {
                c.name = long.clone();
                c.injects = Some(false);
            }),
            Warn,
            "would have room for 63",
        ),
        (
            "TGB107",
            instance().with(|c| c.name = "w".repeat(238)),
            instance().set("/targetGroup/sharing", "Shared".into()).with(|c| c.name = "w".repeat(238)),
            Deny,
            "ConfigMap",
        ),
        (
            "TGB110",
            ip(),
            ip().with(|c| c.target_group = Lookup::Missing),
            Deny,
            "there is no target group arn:",
        ),
        (
            "TGB111",
            ip(),
            ip().set("/targetGroup/targetType", "instance".into()),
            Deny,
            "targets of type ip, not instance",
        ),
        (
            "TGB111",
            ip(),
            ip().with(|c| c.aws().target_type = "lambda".into()),
            Deny,
            "lambda, which can't be bound",
        ),
        ("TGB111", ip(), ip().with(|c| c.aws().protocol = "GENEVE".into()), Deny, "GENEVE"),
        ("TGB112", ip(), ip().set("/targetGroup/ipAddressType", "ipv6".into()), Deny, "is ipv4, not ipv6"),
        (
            "TGB113",
            ip(),
            ip().set("/targetGroup/vpcID", "vpc-00000000".into()),
            Deny,
            "is in vpc-0123456789abcdef0, not in vpc-00000000",
        ),
        ("TGB113", ip(), ip().set("/targetGroup/vpcID", "web".into()), Deny, "no VPC id"),
        ("TGB114", ip(), ip().set("/targetGroup/protocol", "TCP".into()), Deny, "protocol HTTP, not TCP"),
        (
            "TGB115",
            ip().set("/targetGroup/sharing", "Shared".into()).with(|c| c.others = other(Sharing::Shared)),
            ip().with(|c| c.others = other(Sharing::Shared)),
            Deny,
            "ops/old has this target group already",
        ),
        (
            "TGB115",
            ip(),
            ip().with(|c| c.others = [other(Sharing::Shared), other(Sharing::Exclusive)].concat()),
            Deny,
            "ops/old, ops/old have this target group already",
        ),
        (
            "TGB115",
            ip(),
            ip().set("/targetGroup/sharing", "Shared".into()).with(|c| c.others = other(Sharing::Exclusive)),
            Deny,
            "ops/old",
        ),
        (
            "TGB116",
            ip(),
            ip().with(|c| c.aws().load_balancer_arns.clear()),
            Warn,
            "attached to no load balancer",
        ),
        (
            "TGB117",
            instance().with(|c| c.aws().health_check_port = Some("10256".into())),
            instance().with(|c| c.aws().health_check_port = Some("8080".into())),
            Warn,
            "asks port 8080",
        ),
        (
            "TGB118",
            ip().set("/targetGroup/sharing", "Shared".into()).with(|c| c.registered = Some(3)),
            ip().with(|c| c.registered = Some(3)),
            Warn,
            "already has 3 targets",
        ),
        (
            "TGB119",
            update().with(|c| {
                c.old.as_mut().unwrap()["targetGroup"]["sharing"] = "Shared".into();
                c.registered = Some(2);
                c.old_status = json!({"targets": {"registered": 2}});
            }),
            update().with(|c| {
                c.old.as_mut().unwrap()["targetGroup"]["sharing"] = "Shared".into();
                c.registered = Some(3);
                c.old_status = json!({"targets": {"registered": 2}});
            }),
            Deny,
            "has 1 target of others",
        ),
        (
            "TGB121",
            ip().set("/targetGroup/sharing", "Shared".into())
                .with(|c| c.settings.shared_namespaces = Some(vec!["shop".into()])),
            ip().set("/targetGroup/sharing", "Shared".into())
                .with(|c| c.settings.shared_namespaces = Some(Vec::new())),
            Deny,
            "add shop to sharedTargets.namespaces",
        ),
        (
            "TGB201",
            ip(),
            ip().with(|c| c.service = Lookup::Missing),
            Warn,
            "Service shop/web does not exist (yet)",
        ),
        (
            "TGB201",
            ip().without("/serviceRef/port"),
            ip().without("/serviceRef/port").with(|c| c.service = Lookup::Missing),
            Deny,
            "create it first",
        ),
        ("TGB202", ip(), ip().with(|c| c.svc().service_type = "ExternalName".into()), Deny, "ExternalName"),
        (
            "TGB203",
            ip().without("/serviceRef/port"),
            ip().without("/serviceRef/port").with(|c| c.svc().ports.push(port(90, "admin", "TCP"))),
            Deny,
            "write one of 80 (http), 90 (admin)",
        ),
        (
            "TGB204",
            ip().set("/serviceRef/port", "http".into()),
            ip().set("/serviceRef/port", 8080.into()),
            Deny,
            "spec.serviceRef.port: TGB204 Service shop/web has no port 8080; it has 80 (http), 53 (dns)",
        ),
        ("TGB204", ip(), ip().set("/serviceRef/port", "".into()), Deny, "has no port \"\"; it has"),
        (
            "TGB205",
            ip().with(|c| c.svc().service_type = "ClusterIP".into()),
            instance().with(|c| c.svc().service_type = "ClusterIP".into()),
            Deny,
            "is ClusterIP, and instance targets need a nodePort",
        ),
        (
            "TGB205",
            instance(),
            instance().with(|c| c.svc().ports[0].node_port = None),
            Deny,
            "has no nodePort",
        ),
        (
            "TGB206",
            instance(),
            instance().with(|c| c.aws().port = Some(30081)),
            Deny,
            "nodePort 30080, the target group port 30081; set nodePort: 30081 on the Service, or the annotation",
        ),
        (
            "TGB206",
            instance().with(|c| {
                c.aws().port = Some(1);
                c.annotations = json!({"elbv2.k8s.aws/node-port-mismatch": "ignore"});
            }),
            instance().with(|c| {
                c.aws().port = Some(1);
                c.annotations = json!({"elbv2.k8s.aws/node-port-mismatch": "warn"});
            }),
            Warn,
            "nodePort",
        ),
        (
            "TGB207",
            instance().opens(sg(), json!([{"port": 30080}])),
            instance().opens(sg(), json!([{"port": 80}])),
            Warn,
            "no rule opens nodePort 30080",
        ),
        (
            "TGB208",
            ip().opens(sg(), json!([{"port": 8080}])),
            ip().opens(sg(), json!([{"port": 80}])),
            Warn,
            "no rule opens port 8080",
        ),
        (
            "TGB208",
            ip().opens(sg(), json!([])),
            ip().opens(sg(), json!([{"protocol": "UDP"}])),
            Warn,
            "port 8080",
        ),
        (
            "TGB209",
            ip(),
            ip().set("/serviceRef/port", 53.into()),
            Deny,
            "is UDP, which does not fit the target group's protocol HTTP",
        ),
        (
            "TGB209",
            ip().without("/serviceRef/port"),
            ip().without("/serviceRef/port").with(|c| {
                c.svc().ports.remove(0);
            }),
            Deny,
            "no port that fits",
        ),
        (
            "TGB210",
            v6(ip()).with(|c| c.svc().ip_families.push("IPv6".into())),
            v6(ip()),
            Deny,
            "add IPv6 to the Service",
        ),
        ("TGB211", ip(), ip().with(|c| c.svc().selector = None), Warn, "has no selector"),
        (
            "TGB301",
            instance().set("/nodeSelector", json!({"matchLabels": {"a": "b"}})),
            ip().set("/nodeSelector", json!({"matchLabels": {"a": "b"}})),
            Deny,
            "the targets are pods",
        ),
        (
            "TGB301",
            instance()
                .set("/nodeSelector", json!({"matchExpressions": [{"key": "a", "operator": "Exists"}]})),
            instance().set("/nodeSelector", json!({"matchExpressions": [{"key": "a", "operator": "In"}]})),
            Deny,
            "needs values",
        ),
        (
            "TGB302",
            ip().opens(sg(), port_80()),
            ip().opens(json!([{}]), port_80()),
            Deny,
            "spec.networking.ingress[0].from[0]: TGB302 has neither",
        ),
        (
            "TGB302",
            ip().opens(cidr("10.0.0.0/8"), port_80()),
            ip().opens(json!([]), port_80()),
            Deny,
            "is empty",
        ),
        (
            "TGB303",
            ip().opens(cidr("10.0.0.0/8"), port_80()),
            ip().opens(cidr("10.0.0.0"), port_80()),
            Deny,
            "write 10.0.0.0/32",
        ),
        (
            "TGB303",
            v6(ip()).opens(cidr("2001:db8::/32"), port_80()),
            ip().opens(cidr("2001:db8::/32"), port_80()),
            Deny,
            "is not ipv4",
        ),
        (
            "TGB303",
            ip().opens(cidr("10.1.0.0/16"), port_80()),
            ip().opens(cidr("10.1.2.3/16"), port_80()),
            Warn,
            "10.1.0.0/16 is used",
        ),
        (
            "TGB304",
            ip().opens(sg(), port_80()),
            ip().opens(json!([{"securityGroup": {"groupID": "web"}}]), port_80()),
            Deny,
            "no security group id",
        ),
        (
            "TGB305",
            ip().opens(sg(), json!([{"port": "http"}])),
            instance().opens(sg(), json!([{"port": "http"}])),
            Deny,
            "write the nodePort's number",
        ),
        (
            "TGB305",
            ip().opens(sg(), json!([{"port": 65535}])),
            ip().opens(sg(), json!([{"port": 65536}])),
            Deny,
            "between 1 and 65535",
        ),
        (
            "TGB305",
            ip().opens(sg(), json!([{"port": "a-1"}])),
            ip().opens(sg(), json!([{"port": "Http"}])),
            Deny,
            "no port name",
        ),
        (
            "TGB306",
            ip().opens(cidr("10.0.0.0/8"), port_80()),
            ip().opens(cidr("0.0.0.0/0"), port_80()),
            Warn,
            "whole internet",
        ),
        (
            "TGB307",
            ip().opens(sg(), port_80()),
            ip().opens(sg(), (8050..8111).map(|p| json!({"port": p})).collect()),
            Warn,
            "makes 61 rules",
        ),
        ("TGB401", role(ip()), role(instance()), Deny, "use ip targets"),
        (
            "TGB401",
            role(ip()),
            ip().set("/targetGroup/assumeRole", json!({"externalID": "x"})),
            Deny,
            "needs a role",
        ),
        (
            "TGB401",
            role(ip()),
            role(ip()).set("/targetGroup/assumeRole/roleARN", "tgb-shop".into()),
            Deny,
            "no role ARN",
        ),
        (
            "TGB402",
            role(ip()),
            role(ip()).with(|c| c.settings.assume_role_allow.clear()),
            Deny,
            "the operator allows no role",
        ),
        (
            "TGB402",
            role(ip()),
            role(ip()).with(|c| c.settings.assume_role_allow = vec!["arn:aws:iam::*:role/other".into()]),
            Deny,
            "allowed are arn:",
        ),
        (
            "TGB403",
            ip().with(|c| {
                c.settings.require_tag("env=prod");
                c.tags = tags(&[("env", "prod")]);
            }),
            ip().with(|c| {
                c.settings.require_tag("env=prod");
                c.tags = tags(&[("env", "dev")]);
            }),
            Deny,
            "must be \"prod\"",
        ),
        (
            "TGB403",
            ip().with(|c| {
                c.settings.require_tag("env");
                c.tags = tags(&[("env", "x")]);
            }),
            ip().with(|c| {
                c.settings.require_tag("env");
                c.tags = tags(&[]);
            }),
            Deny,
            "lacks the tag env",
        ),
        ("TGB404", tagged(ip(), "ops shop"), tagged(ip(), "ops shopping"), Deny, "not to namespace shop"),
        ("TGB404", tagged(ip(), "@all"), tagged(ip(), "shop-a."), Deny, "shop"),
        ("TGB405", quic(ip()), quic(instance()), Deny, "QUIC needs ip targets"),
    ]
}

#[test]
fn every_rule_lets_pass_what_is_right_and_finds_what_is_wrong() {
    for (rule, right, wrong, severity, part) in table() {
        let passed = right.check();
        assert!(passed.iter().all(|f| f.rule != rule), "{rule} should pass: {passed:?}");
        let found = wrong.check();
        let texts: Vec<String> = found.iter().map(|f| f.in_version("v1")).collect();
        let hit = found
            .iter()
            .any(|f| f.rule == rule && f.severity == severity && f.in_version("v1").contains(part));
        assert!(hit, "{rule} {severity:?} {part:?} is not among {texts:#?}");
    }
}

#[test]
fn the_table_of_cases_has_every_rule_that_check_can_find() {
    let tested: std::collections::BTreeSet<_> = table().into_iter().map(|case| case.0).collect();
    let missing: Vec<_> = RULES
        .iter()
        .map(|r| r.id)
        .filter(|id| !tested.contains(id) && !["TGB501", "TGB601"].contains(id))
        .collect();
    assert_eq!(missing, Vec::<&str>::new());
}

#[test]
fn a_binding_as_it_should_be_has_no_finding() {
    assert_eq!(ip().check(), []);
    assert_eq!(instance().check(), []);
}

#[test]
fn all_findings_come_at_once_refusals_first() {
    let case = ip()
        .set("/targetGroup/protocol", "TCP".into())
        .set("/serviceRef/port", 8080.into())
        .with(|c| c.aws().load_balancer_arns.clear());
    let found: Vec<_> = case.check().iter().map(|f| f.rule).collect();
    assert_eq!(found, ["TGB114", "TGB204", "TGB116"]);
}

#[test]
fn an_old_object_stays_editable_where_the_rule_does_not_look() {
    let broken = |case: Case| case.with(|c| c.svc().ports.clear()).opens(cidr("10.0.0.0"), port_80());
    assert!(broken(ip()).check().iter().any(|f| f.rule == "TGB204"));
    let mut case = broken(update());
    case.old = Some(case.spec.clone());
    let case = case.set("/targetGroup/sharing", "Shared".into());
    assert_eq!(case.check(), []);
}

#[test]
fn what_is_filled_in_is_no_change_of_an_old_object() {
    // As old releases of LBC left them: no address type, no protocol, no VPC; and wrong in what was never checked.
    let old = || {
        let bare = ["targetType", "ipAddressType", "protocol", "vpcID"]
            .iter()
            .fold(update(), |case, field| case.without(&format!("/targetGroup/{field}")));
        let mut case = bare
            .with(|c| c.svc().ip_families = vec!["IPv6".into()])
            .set("/nodeSelector", json!({"matchLabels": {"a": "b"}}))
            .opens(cidr("2001:db8::/32"), json!([{"port": 0}]))
            .set("/serviceRef/port", 0.into());
        case.old = Some(case.spec.clone());
        case.set("/targetGroup/targetType", "ip".into())
            .set("/targetGroup/ipAddressType", "ipv4".into())
            .set("/targetGroup/protocol", "HTTP".into())
            .set("/targetGroup/vpcID", "vpc-0123456789abcdef0".into())
            .set("/serviceRef/port", 80.into())
    };
    let found = |case: Case| case.check().iter().map(|f| f.rule).collect::<Vec<_>>();
    assert_eq!(found(old()), [""; 0]);
    // Another value than what is filled in is a change.
    assert!(found(old().set("/targetGroup/ipAddressType", "ipv6".into())).contains(&"TGB112"));
    assert_eq!(found(old().set("/serviceRef/port", 81.into())), ["TGB204"]);
    // So is an ARN for a name that means another target group.
    let mut named = update().set("/targetGroup/name", "api".into()).without("/targetGroup/arn");
    named.old = Some(named.spec.clone());
    assert_eq!(found(named.set("/targetGroup/arn", ARN.into())), ["TGB105"]);
}

#[test]
fn each_rule_looks_only_where_its_own_fields_changed() {
    // Wrong in everything that is looked up, and stored that way.
    let broken = || {
        let mut case = update()
            .set("/targetGroup/arn", ARN.replace("eu-west-1", "eu-west-2").into())
            .set("/targetGroup/vpcID", "vpc-00000000".into())
            .with(|c| {
                c.aws().protocol = "TCP".into();
                c.aws().ip_address_type = "ipv6".into();
                c.aws().target_type = "instance".into();
            });
        case.old = Some(case.spec.clone());
        case
    };
    let found = |case: Case| case.check().iter().map(|f| f.rule).collect::<Vec<_>>();
    assert_eq!(found(broken().set("/targetGroup/sharing", "Shared".into())), [""; 0]);
    assert_eq!(found(broken().set("/targetGroup/vpcID", "vpc-00000001".into())), ["TGB106", "TGB113"]);
    let named = broken().set("/targetGroup/name", "api".into());
    assert!(found(named).contains(&"TGB105"));
}

#[test]
fn a_target_group_that_was_made_anew_under_its_name_can_be_bound_again() {
    let anew = ARN.replace("1ce5b7da835c9ffb", "2ce5b7da835c9ffb");
    let case = || update().set("/targetGroup/arn", anew.clone().into());
    assert_eq!(case().check()[0].rule, "TGB106");
    let known = case().with(|c| c.aws().arn = TargetGroupArn::parse(&anew).unwrap());
    assert_eq!(known.check(), []);
}

#[test]
fn a_lone_dot_opens_a_target_group_to_nobody() {
    let open = |value: &'static str| {
        ip().with(|c| {
            c.settings.namespace_tag = Some("namespaces".into());
            c.tags = tags(&[("namespaces", value)]);
        })
        .check()
        .is_empty()
    };
    assert!(open("team-a: sh.") && open("shop") && open("@all"));
    assert!(!open(".") && !open("..") && !open("") && !open("sho"));
}

#[test]
fn a_port_of_zero_is_a_missing_one() {
    assert_eq!(ip().set("/serviceRef/port", 0.into()).check(), []);
}

#[test]
fn settings_change_severities_and_enforce_softens_policy_only() {
    let wrong = || ip().set("/serviceRef/port", 8080.into()).opens(json!([{}]), port_80());
    let seen = |settings: &dyn Fn(&mut Settings)| -> Vec<(&str, Severity)> {
        wrong().with(|c| settings(&mut c.settings)).check().iter().map(|f| (f.rule, f.severity)).collect()
    };
    assert_eq!(seen(&|_| {}), [("TGB204", Severity::Deny), ("TGB302", Severity::Deny)]);
    assert_eq!(seen(&|s| s.warn_only = true), [("TGB302", Severity::Deny), ("TGB204", Severity::Warn)]);
    assert_eq!(seen(&|s| s.set_rule("TGB204=off").unwrap()), [("TGB302", Severity::Deny)]);
    assert!(Settings::default().set_rule("TGB999=off").unwrap_err().contains("TGB999"));
    assert!(Settings::default().set_rule("TGB204=never").is_err());
    assert!(Settings::default().set_rule("TGB501=deny").unwrap_err().contains("never refuses"));
}

#[test]
fn a_variable_that_is_set_to_nothing_allows_and_requires_nothing() {
    let nothing = [String::new()];
    let mut settings = Settings::of_tenants(&nothing, &nothing, Some(""));
    settings.set_rules(&nothing).unwrap();
    assert_eq!(format!("{settings:?}"), format!("{:?}", Settings::default()));
    let given = Settings::of_tenants(&["r*".into()], &["a=b".into(), "c".into()], Some("ns"));
    assert!(given.may_assume("role") && given.namespace_tag.as_deref() == Some("ns"));
    assert_eq!(given.required_tags, [("a".into(), Some("b".into())), ("c".into(), None)]);
}

#[test]
fn a_vpc_id_that_is_none_is_a_matter_of_shape_and_another_vpc_is_not() {
    let found = |id: &str, settings: &str| {
        let case = ip().set("/targetGroup/vpcID", id.into()).with(|c| {
            c.settings.warn_only = true;
            c.settings.set_rule(settings).unwrap();
        });
        case.check().iter().map(|f| (f.rule, f.severity, f.kind)).collect::<Vec<_>>()
    };
    assert_eq!(found("mine", "TGB116=warn"), [("TGB113", Severity::Deny, Kind::Shape)]);
    assert_eq!(found("vpc-00000000", "TGB116=warn"), [("TGB113", Severity::Warn, Kind::Policy)]);
    assert_eq!(found("mine", "TGB113=warn"), [("TGB113", Severity::Warn, Kind::Shape)]);
}

#[test]
fn the_annotation_softens_a_mismatch_whatever_the_operator_decided() {
    let found = |meant: &str, settings: &str| {
        let mut case = instance().with(|c| c.aws().port = Some(30081));
        case.annotations = json!({"elbv2.k8s.aws/node-port-mismatch": meant});
        case.settings.set_rule(settings).unwrap();
        case.check().iter().map(|f| (f.rule, f.severity)).collect::<Vec<_>>()
    };
    assert_eq!(found("no", "TGB206=deny"), [("TGB206", Severity::Deny)]);
    assert_eq!(found("warn", "TGB206=deny"), [("TGB206", Severity::Warn)]);
    assert_eq!(found("ignore", "TGB206=deny"), []);
    assert_eq!(found("warn", "TGB206=off"), []);
}

#[test]
fn nobody_is_told_to_leave_out_what_an_update_takes_from_the_stored_object() {
    let wrong = |case: Case| case.set("/targetGroup/targetType", "instance".into());
    let said = |case: Case| case.check().iter().find(|f| f.rule == "TGB111").unwrap().message.clone();
    assert!(said(wrong(ip())).ends_with("write targetType: ip, or leave it out"));
    assert!(said(wrong(update())).ends_with("write targetType: ip"));
}

#[test]
fn paths_are_those_of_the_users_version() {
    let found = ip().set("/targetGroup/vpcID", "web".into()).check();
    assert!(found[0].in_version("v1beta1").starts_with("spec.vpcID: TGB113 "));
    assert_eq!(path_in("v1beta1", "spec.targetGroup.assumeRole.roleARN"), "spec.iamRoleArnToAssume");
    assert_eq!(path_in("v1alpha1", "spec.serviceRef.port"), "spec.serviceRef.port");
}

#[test]
fn a_glob_matches_the_whole_text() {
    assert!(matches_glob("*", "anything"));
    assert!(matches_glob("arn:*:role/a-*", "arn:aws:iam::1:role/a-b"));
    assert!(!matches_glob("arn:*:role/a", "arn:aws:iam::1:role/ab"));
    assert!(!matches_glob("a*a", "a"));
    assert!(matches_glob("exact", "exact") && !matches_glob("exact", "exactly"));
}

#[test]
fn without_an_answer_of_aws_only_complete_objects_are_admitted() {
    let settings = Settings::default();
    let severity =
        |needed, admit| aws_unavailable("spec", "timeout", needed, admit, &settings).unwrap().severity;
    assert_eq!(severity(false, true), Severity::Warn);
    assert_eq!(severity(false, false), Severity::Deny);
    assert_eq!(severity(true, true), Severity::Deny);
    let mut strict = Settings::default();
    strict.set_rule("TGB601=deny").unwrap();
    let severity =
        |settings: &Settings| aws_unavailable("spec", "timeout", false, true, settings).unwrap().severity;
    assert_eq!(severity(&strict), Severity::Deny);
    assert_eq!(severity(&Settings { warn_only: true, ..strict }), Severity::Warn);
    let softened = Settings { warn_only: true, ..Settings::default() };
    let finding = aws_unavailable("spec", "timeout", true, false, &softened).unwrap();
    assert_eq!(finding.severity, Severity::Warn);
    assert!(finding.in_version("v1beta1").contains("write targetGroupARN, targetType, targetGroupProtocol"));
    assert_eq!(finding.in_version("v1alpha1"), finding.in_version("v1beta1"));
}

#[test]
fn the_documentation_is_that_of_the_table() {
    let kept = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/rules.md")).unwrap();
    assert!(kept == document(), "docs/rules.md is old; run `tgb-webhook rules > docs/rules.md`");
}

#[test]
fn a_finding_speaks_the_version_of_the_manifest() {
    let finding = Finding {
        rule: "TGB115",
        path: "spec.targetGroup.arn".into(),
        message: "shop/web has this target group already; set sharing: Shared on all of them".into(),
        severity: Severity::Deny,
        kind: Kind::Policy,
    };
    assert!(finding.in_version("v1").starts_with("spec.targetGroup.arn: TGB115 "));
    let old = finding.in_version("v1beta1");
    assert!(
        old.starts_with("spec.targetGroupARN: TGB115 ") && old.contains("multiClusterTargetGroup: true"),
        "{old}"
    );
}
