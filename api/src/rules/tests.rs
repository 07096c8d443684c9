//! Every rule with a case that it lets pass and one that it finds.

use super::*;
use crate::arn::TargetGroupArn;
use crate::service::ServicePort;
use crate::target_group::TargetGroup;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

const ARN: &str = "arn:aws:elasticloadbalancing:eu-west-1:123456789012:targetgroup/web/1ce5b7da835c9ffb";
const ROLE: &str = "arn:aws:iam::123456789012:role/tgb-shop";

/// A binding with everything it needs around it, in which each case changes what it is about.
struct Case {
    operation: Operation,
    name: String,
    spec: Value,
    annotations: Value,
    old_annotations: Value,
    old: Option<Value>,
    old_status: Value,
    service: Lookup<Service>,
    target_group: Lookup<TargetGroup>,
    named: Lookup<TargetGroup>,
    tags: Option<BTreeMap<String, String>>,
    registered: Option<usize>,
    foreign: Option<usize>,
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
        old_annotations: json!({}),
        old: None,
        old_status: Value::Null,
        service: Lookup::Found(service()),
        target_group: Lookup::Found(target_group()),
        named: Lookup::Unknown,
        tags: None,
        registered: Some(0),
        foreign: Some(0),
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
        let parse = |spec: &Value, status: &Value, annotations: &Value| -> TargetGroupBinding {
            let mut object = json!({"spec": spec,
                "metadata": {"name": self.name, "namespace": "shop", "annotations": annotations}});
            if !status.is_null() {
                object["status"] = status.clone();
            }
            serde_json::from_value(object).unwrap()
        };
        let old = self.old.as_ref().map(|spec| parse(spec, &self.old_status, &self.old_annotations));
        let context = Context {
            service: borrow(&self.service),
            target_group: borrow(&self.target_group),
            named: borrow(&self.named),
            tags: self.tags.as_ref(),
            registered: self.registered,
            foreign: self.foreign,
            others: Some(&self.others),
            injects: self.injects,
        };
        check(
            self.operation,
            &parse(&self.spec, &Value::Null, &self.annotations),
            old.as_ref(),
            &context,
            &self.settings,
        )
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

fn udp(case: Case) -> Case {
    case.set("/targetGroup/protocol", "UDP".into())
        .with(|c| {
            c.aws().protocol = "UDP".into();
            c.aws().port = Some(30053);
        })
        .set("/serviceRef/port", 53.into())
}

/// TCP and UDP of one number.
fn dual(case: Case) -> Case {
    udp(case).set("/targetGroup/protocol", "TCP_UDP".into()).with(|c| {
        c.aws().protocol = "TCP_UDP".into();
        c.svc().ports = vec![port(53, "dns-tcp", "TCP"), port(53, "dns", "UDP")];
    })
}

fn named_target(case: Case) -> Case {
    case.with(|c| c.svc().ports[0].target_port = Some(IntOrString::String("server".into())))
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
            "account 123456789012, the controller in 210987654321; set assumeRole",
        ),
        (
            "TGB104",
            role(ip()),
            role(ip())
                .set("/targetGroup/assumeRole/roleARN", ROLE.replace("123456789012", "210987654321").into()),
            Deny,
            "account 123456789012, the role in 210987654321; set assumeRole to a role of account 123456789012",
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
            update().set("/targetGroup/name", "web".into()),
            update()
                .set("/targetGroup/name", "api".into())
                .with(|c| c.old.as_mut().unwrap()["targetGroup"]["name"] = "web".into()),
            Deny,
            "spec.targetGroup.name: TGB106 can't change from web to api",
        ),
        (
            "TGB106",
            update().with(|c| {
                c.old.as_mut().unwrap()["targetGroup"].as_object_mut().unwrap().remove("vpcID");
            }),
            update().without("/targetGroup/vpcID"),
            Deny,
            "can't be removed once set (was vpc-0123456789abcdef0)",
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
            "no target group targetgroup/web/1ce5b7da835c9ffb in account 123456789012, region eu-west-1",
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
        ("TGB113", ip(), ip().set("/targetGroup/vpcID", "web".into()), Deny, "not a VPC ID"),
        ("TGB114", ip(), ip().set("/targetGroup/protocol", "TCP".into()), Deny, "protocol HTTP, not TCP"),
        (
            "TGB115",
            ip().set("/targetGroup/sharing", "Shared".into()).with(|c| c.others = other(Sharing::Shared)),
            ip().with(|c| c.others = other(Sharing::Shared)),
            Deny,
            "target group web is already bound by TargetGroupBinding ops/old; bind",
        ),
        (
            "TGB115",
            ip(),
            ip().with(|c| c.others = [other(Sharing::Shared), other(Sharing::Exclusive)].concat()),
            Deny,
            "TargetGroupBindings ops/old, ops/old; bind",
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
            "no load balancer uses target group web",
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
            ip().set("/targetGroup/sharing", "Shared".into()).with(|c| c.foreign = Some(3)),
            ip().with(|c| c.foreign = Some(3)),
            Warn,
            "target group web already has 3 targets that this binding does not register; they stay until",
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
            "TGB120",
            ip().with(|c| {
                c.annotations = json!({"elbv2.k8s.aws/paused": "true", "example.com/paused": "yes"})
            }),
            ip().with(|c| c.annotations = json!({"elbv2.k8s.aws/paused": "yes"})),
            Warn,
            "metadata.annotations: TGB120 \"yes\" is not a value of elbv2.k8s.aws/paused; write true or false",
        ),
        (
            "TGB120",
            ip(),
            update().with(|c| c.annotations = json!({"elbv2.k8s.aws/pausd": "true"})),
            Warn,
            "elbv2.k8s.aws/pausd is not an annotation of ours",
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
            "Service shop/web does not exist yet",
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
            "Service shop/web has several that fit HTTP; write one of 80 (http), 90 (admin)",
        ),
        (
            "TGB204",
            ip().set("/serviceRef/port", "http".into()),
            ip().set("/serviceRef/port", 8080.into()),
            Deny,
            "spec.serviceRef.port: TGB204 Service shop/web has no port 8080; it has 80 (http), 53 (dns)",
        ),
        ("TGB204", ip(), ip().set("/serviceRef/port", "".into()), Deny, "has no port named \"\"; it has"),
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
            "exposes port 80 (http) at nodePort 30080, but target group web was created for port 30081; set nodePort: \
             30081 on that Service port, or, if 30080 is intended, annotate",
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
            "does not allow TCP 30080, the nodePort that the load balancer sends traffic and health checks to",
        ),
        (
            "TGB208",
            ip().opens(sg(), json!([{"port": 8080}])),
            ip().opens(sg(), json!([{"port": 80}])),
            Warn,
            "does not allow TCP 8080, the pods' port",
        ),
        (
            "TGB208",
            ip().opens(sg(), json!([])),
            ip().opens(sg(), json!([{"protocol": "UDP"}])),
            Warn,
            "TCP 8080",
        ),
        (
            "TGB208",
            udp(ip()).opens(sg(), json!([{"protocol": "UDP"}, {"port": 8053}])),
            udp(ip()).opens(sg(), json!([{"protocol": "UDP"}])),
            Warn,
            "does not allow TCP 8053, the port that the load balancer sends health checks to",
        ),
        (
            "TGB208",
            udp(ip()).opens(sg(), json!([{"protocol": "UDP"}, {"port": 9000}])).with(|c| {
                c.aws().health_check_port = Some("9000".into());
            }),
            udp(ip()).opens(sg(), json!([{"protocol": "UDP"}, {"port": 8053}])).with(|c| {
                c.aws().health_check_port = Some("9000".into());
            }),
            Warn,
            "does not allow TCP 9000, the port",
        ),
        (
            "TGB208",
            dual(ip()).opens(sg(), json!([{"protocol": "UDP"}, {"port": 8053}])),
            dual(ip()).opens(sg(), json!([{"port": 8053}])),
            Warn,
            "does not allow UDP 8053, the pods' port that the load balancer sends traffic to;",
        ),
        (
            "TGB208",
            dual(ip()),
            dual(ip()).with(|c| c.svc().ports[1].target_port = Some(IntOrString::Int(5354))),
            Warn,
            "spec.serviceRef.port: TGB208 a target has one port, but Service shop/web leads TCP to targetPort 8053 and the \
             other protocol of TCP_UDP to 5354",
        ),
        (
            "TGB208",
            named_target(ip()).opens(sg(), json!([{"port": "server"}])),
            named_target(ip()).opens(sg(), json!([{"port": "http"}])),
            Warn,
            "does not allow TCP server, the pods' port that the load balancer sends traffic and health checks to; add it to \
             ingress[].ports; http, which it allows, is the Service's port",
        ),
        (
            "TGB207",
            dual(instance()),
            dual(instance()).with(|c| c.svc().ports[1].node_port = Some(30054)),
            Warn,
            "has nodePort 30053 for TCP and 30054 for the other protocol of TCP_UDP; give both one nodePort",
        ),
        (
            "TGB207",
            dual(instance()),
            dual(instance()).with(|c| {
                c.svc().ports.remove(1);
            }),
            Warn,
            "has port 53 for TCP only",
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
        (
            "TGB212",
            ip(),
            ip().set("/serviceRef/name", "".into()),
            Deny,
            "spec.serviceRef.name: TGB212 is empty",
        ),
        (
            "TGB212",
            ip(),
            ip().set("/serviceRef/name", "web?watch=true".into()),
            Deny,
            "\"web?watch=true\" is not the name of a Service",
        ),
        (
            "TGB212",
            ip().set("/targetGroup/name", "web".into()),
            ip().set("/targetGroup/name", "w".repeat(33).into()),
            Deny,
            "spec.targetGroup.name: TGB212",
        ),
        (
            "TGB212",
            role(ip()),
            role(ip()).set("/targetGroup/assumeRole/roleARN", format!("{ROLE}{}", "x".repeat(2048)).into()),
            Deny,
            "spec.targetGroup.assumeRole.roleARN: TGB212",
        ),
        (
            "TGB212",
            role(ip()).set("/targetGroup/assumeRole/externalID", "x".repeat(1224).into()),
            role(ip()).set("/targetGroup/assumeRole/externalID", "x".repeat(1225).into()),
            Deny,
            "the external id has 1225 characters; AWS takes 2 to 1224",
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
            "not a security group ID",
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
            "65536 is not a port; ports are 1 to 65535",
        ),
        (
            "TGB305",
            ip().opens(sg(), json!([{"port": "a-1"}])),
            ip().opens(sg(), json!([{"port": "Http"}])),
            Deny,
            "not a port name",
        ),
        (
            "TGB305",
            ip().opens(sg(), json!([{"port": 8080}])),
            ip().opens(sg(), json!([{"port": "8080"}])),
            Deny,
            "a port in quotes is a name; write 8080 without them",
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
            ip().opens((0..31).map(|_| sg()[0].clone()).collect(), json!([{"port": 8080}, {"port": 8081}])),
            Warn,
            "makes 62 rules",
        ),
        (
            "TGB308",
            ip().opens((0..50).map(|_| sg()[0].clone()).collect(), port_80()),
            ip().opens((0..51).map(|_| sg()[0].clone()).collect(), port_80()),
            Deny,
            "spec.networking.ingress[0].from: TGB308 has 51 entries, 50 are allowed",
        ),
        (
            "TGB308",
            ip(),
            ip().opens(sg(), (0..51).map(|_| json!({"port": 8080})).collect()),
            Deny,
            "spec.networking.ingress[0].ports: TGB308",
        ),
        (
            "TGB308",
            ip(),
            ip().set(
                "/networking",
                json!({"ingress": (0..51).map(|_| json!({"from": sg()})).collect::<Vec<_>>()}),
            ),
            Deny,
            "spec.networking.ingress: TGB308",
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
            "not a role ARN",
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
            "no pattern of the operator's matches it",
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
        (
            "TGB404",
            tagged(ip(), "ops shop"),
            tagged(ip(), "ops shopping"),
            Deny,
            "namespace shop may not bind target group web: its AWS tag \"namespaces\" lists \"ops shopping\"",
        ),
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
fn a_target_group_that_was_made_again_under_its_name_can_be_bound_again() {
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
    let unknown = [("TGB206", Severity::Deny), ("TGB120", Severity::Warn)];
    assert_eq!(found("no", "TGB206=deny"), unknown);
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
    assert!(finding.in_version("v1beta1").contains("set targetGroupARN, targetType, targetGroupProtocol"));
    assert!(finding.in_version("v1").contains("set arn, targetType, protocol"));
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

#[test]
fn long_lists_are_one_finding_and_any_number_of_findings_are_fifty() {
    let peers = |n: usize| (0..n).map(|_| json!({})).collect::<Value>();
    let found = ip().opens(peers(300_000), json!([])).check();
    assert_eq!(found.iter().map(|f| f.rule).collect::<Vec<_>>(), ["TGB308"]);
    let rules: Vec<Value> = (0..50).map(|_| json!({"from": peers(50)})).collect();
    let found = ip().set("/networking", json!({"ingress": rules})).check();
    assert_eq!(found.len(), 50);
    assert!(found[49].message.ends_with("; and 2450 more"), "{}", found[49].message);
    // Warnings keep no refusal from being told.
    let mut warned: Vec<Value> =
        (0..50).map(|n| json!({"ipBlock": {"cidr": format!("10.{n}.0.1/16")}})).collect();
    warned.push(json!({"ipBlock": {"cidr": "10.0.0.1/16"}}));
    let two = json!({"ingress": [{"from": warned[..50]}, {"from": [warned[50], {}]}]});
    let found = ip().set("/networking", two).check();
    assert_eq!((found[0].rule, found[0].severity), ("TGB302", Severity::Deny));
    assert_eq!(found.len(), 51);
    assert!(found[50].message.ends_with("; and 1 more"), "{}", found[50].message);
}

#[test]
fn what_the_controller_enforces_is_found_among_any_number_of_other_faults() {
    let rules: Vec<Value> = (0..50).map(|_| json!({"from": [{}, {}]})).collect();
    let case = ip()
        .set("/networking", json!({"ingress": rules}))
        .set("/targetGroup/assumeRole", json!({"roleARN": ROLE}));
    assert!(case.check().iter().any(|f| f.rule == "TGB402"));
}

#[test]
fn a_longer_list_of_a_stored_binding_may_get_shorter_and_not_longer() {
    let networking = |n: usize| {
        let peers: Vec<Value> =
            (0..n).map(|n| json!({"ipBlock": {"cidr": format!("198.51.{n}.0/24")}})).collect();
        json!({"ingress": [{"from": peers, "ports": port_80()}]})
    };
    let found = |was: usize, is: usize| {
        let mut case = update();
        case.old.as_mut().unwrap()["networking"] = networking(was);
        let case = case.set("/networking", networking(is));
        case.check().iter().map(|f| f.rule).collect::<Vec<_>>()
    };
    assert_eq!(found(60, 59), [""; 0]);
    assert_eq!(found(60, 61), ["TGB308"]);
    assert_eq!(found(49, 51), ["TGB308"]);
}

#[test]
fn no_message_repeats_more_than_64_characters_of_a_users_text() {
    let long = "L".repeat(100_000);
    let text = || Value::from(long.clone());
    let peers = json!([{"ipBlock": {"cidr": long}}, {"securityGroup": {"groupID": long}}]);
    let of_aws = ip()
        .set("/targetGroup/arn", text())
        .set("/targetGroup/name", text())
        .set("/targetGroup/vpcID", text())
        .set("/targetGroup/assumeRole", json!({"roleARN": long, "externalID": long}))
        .set("/serviceRef/name", text())
        .opens(peers, json!([{"port": long}]));
    let of_service = instance()
        .set("/serviceRef/port", text())
        .set("/nodeSelector", json!({"matchLabels": {"a": long}}))
        .with(|c| {
            c.annotations = json!({"elbv2.k8s.aws/paused": long, format!("elbv2.k8s.aws/{long}"): "x"})
        });
    let another_service = ip()
        .set("/targetGroup/arn", format!("arn:aws:{long}:eu-west-1:123456789012:targetgroup/web/1").into());
    let changed = update()
        .set("/targetGroup/arn", text())
        .set("/targetGroup/name", text())
        .with(|c| c.old.as_mut().unwrap()["targetGroup"]["name"] = text());
    let by_name = ip().without("/targetGroup/arn").set("/targetGroup/name", text()).with(|c| {
        c.target_group = Lookup::Missing;
        c.service = Lookup::Missing;
    });
    let tagged = ip().with(|c| {
        c.settings.namespace_tag = Some("namespaces".into());
        c.settings.require_tag("team=shop");
        c.tags = tags(&[("namespaces", &long), ("team", &long)]);
    });
    for case in [of_aws, of_service, another_service, changed, by_name, tagged] {
        let found = case.check();
        assert!(found.iter().any(|f| f.message.contains("LLL")), "{found:?}");
        for finding in found {
            assert!(finding.message.matches('L').count() < 150, "{}", finding.message);
            assert!(!finding.message.contains(&"L".repeat(65)), "{}", finding.message);
        }
    }
}

#[test]
fn what_is_meant_by_a_port_that_a_service_lacks_is_guessed_and_said() {
    let said = |port: Value| {
        let case = ip().set("/serviceRef/port", port).with(|c| {
            c.svc().ports.push(ServicePort {
                name: Some("Admin".into()),
                port: 9090,
                protocol: "TCP".into(),
                target_port: Some(IntOrString::String("server".into())),
                node_port: None,
            });
        });
        let found = case.check();
        let hit = found.iter().find(|f| f.rule == "TGB204").unwrap();
        hit.message.rsplit_once("9090 (Admin)").unwrap().1.to_owned()
    };
    assert_eq!(said("80".into()), "; a port in quotes is a name, so write 80 without quotes");
    assert_eq!(said("80/TCP".into()), "; a port in quotes is a name, so write 80 without quotes");
    assert_eq!(said(8080.into()), "; 8080 is the targetPort of 80 (http), so write 80");
    assert_eq!(said("8080".into()), "; 8080 is the targetPort of 80 (http), so write 80");
    assert_eq!(said(30053.into()), "; 30053 is the nodePort of 53 (dns), so write 53");
    // The list is the last that is said otherwise.
    assert_eq!(said("nobody".into()), "");
    assert_eq!(said(81.into()), "");
    assert_eq!(said("HTTP".into()), "; write http");
}

#[test]
fn no_node_port_is_advised_that_cannot_be_one() {
    let said = |port: u16| {
        let found = instance().with(|c| c.aws().port = Some(port)).check();
        found.into_iter().find(|f| f.rule == "TGB206").unwrap().message
    };
    for port in [1, 80, 29_999, 32_768, 65_535] {
        let message = said(port);
        assert!(!message.contains(&format!("set nodePort: {port}")), "{message}");
        assert!(message.contains("recreate the target group with port 30080"), "{message}");
    }
    assert!(said(30_000).contains("set nodePort: 30000") && said(32_767).contains("set nodePort: 32767"));
    assert!(said(30_053).contains("which is the nodePort of port 53 (dns); write 53, or"));
}

#[test]
fn no_setting_softens_what_the_controller_enforces() {
    for rule in RULES {
        for word in ["warn", "off", "deny"] {
            let mut settings = Settings::default();
            if settings.set_rule(&format!("{}={word}", rule.id)).is_err() {
                continue;
            }
            let refused = settings.refuse_softened();
            assert_eq!(refused.is_err(), rule.enforced && word != "deny", "{} {word}", rule.id);
        }
    }
    let mut settings = Settings::default();
    settings.set_rule("TGB402=off").unwrap();
    assert!(settings.refuse_softened().unwrap_err().ends_with("see docs/rules.md#tgb402"));
    assert!(!settings.may_assume(ROLE));
}

#[test]
fn aws_is_asked_only_about_what_can_be_there_and_may_be_used() {
    let ask = |case: Case| {
        let spec: Spec = serde_json::from_value(case.spec).unwrap();
        case.settings.may_ask(&spec.target_group)
    };
    let role = |case: Case, arn: &str| {
        case.set("/targetGroup/assumeRole", json!({"roleARN": arn}))
            .with(|c| c.settings.assume_role_allow = vec!["arn:aws:iam::*:role/tgb-*".into()])
    };
    assert!(ask(ip()) && ask(role(ip(), ROLE)));
    assert!(ask(ip().without("/targetGroup/arn").set("/targetGroup/name", "web".into())));
    assert!(!ask(ip().without("/targetGroup/arn")));
    assert!(!ask(ip().without("/targetGroup/arn").set("/targetGroup/name", "w".repeat(1_000_000).into())));
    assert!(!ask(ip().set("/targetGroup/arn", "web".into())));
    assert!(!ask(ip().set("/targetGroup/arn", ARN.replace("eu-west-1", "eu-west-2").into())));
    assert!(!ask(ip().set("/targetGroup/arn", ARN.replace("123456789012", "210987654321").into())));
    assert!(!ask(role(ip(), &ROLE.replace("tgb", "admin"))));
    assert!(!ask(role(ip(), &ROLE.replace("123456789012", "210987654321"))));
    assert!(!ask(role(ip(), &format!("{ROLE}{}", "x".repeat(3000)))));
    assert!(!ask(role(ip(), ROLE).set("/targetGroup/assumeRole/externalID", "x".repeat(2000).into())));
    assert!(!ask(role(instance(), ROLE)));
}

#[test]
fn each_rule_has_a_heading_that_references_lead_to() {
    let document = document();
    for rule in RULES {
        // GitHub's anchor of a heading of one word is that word in small letters.
        let anchor = reference(rule.id).split_once('#').unwrap().1.to_owned();
        let headings = document.lines().filter_map(|line| line.strip_prefix("## "));
        assert_eq!(
            headings.filter(|heading| heading.to_ascii_lowercase() == anchor).count(),
            1,
            "{}",
            rule.id
        );
    }
}

#[test]
fn an_annotation_that_was_there_before_is_not_told_again() {
    let told = |was: Value, is: Value| {
        let mut case = update();
        (case.old_annotations, case.annotations) = (was, is);
        case.check().len()
    };
    let typo = || json!({"elbv2.k8s.aws/pausd": "true"});
    assert_eq!((told(typo(), typo()), told(json!({}), typo())), (0, 1));
}
