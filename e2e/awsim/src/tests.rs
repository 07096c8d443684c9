//! The state machine in sentences: calls and a clock in, answers out.

use std::net::Ipv4Addr;

use crate::state::{Aws, Cluster, InstanceState, Node, Probe, Quotas, Timing};
use crate::wire::{AwsError, Params};
use crate::world::{Effect, Fault, Options, Request, Role, Wire, World};

const T0: u64 = 1_000_000;

fn enc(pairs: &[(&str, &str)]) -> Params {
    let mut form = form_urlencoded::Serializer::new(String::new());
    form.extend_pairs(pairs);
    Params::parse(form.finish().as_bytes())
}

fn aws() -> Aws {
    let mut aws = Aws::new("111122223333", "us-west-2", Timing::default(), Quotas::default());
    aws.seed_cluster(&Cluster {
        nodes: vec![
            Node { instance: "i-00000000000000001".into(), subnet: 0, ..Node::default() },
            Node {
                instance: "i-00000000000000002".into(),
                subnet: 1,
                pod_prefixes: vec!["10.244.1.0/24".parse().unwrap()],
                ..Node::default()
            },
        ],
        ..Cluster::default()
    });
    aws
}

fn elb(aws: &mut Aws, now: u64, action: &str, pairs: &[(&str, &str)]) -> Result<String, AwsError> {
    aws.elb(action, &enc(pairs), now).map(crate::wire::Xml::finish)
}

fn ec2(aws: &mut Aws, action: &str, pairs: &[(&str, &str)]) -> Result<String, AwsError> {
    aws.ec2(action, &enc(pairs), T0).map(crate::wire::Xml::finish)
}

/// The first text of an element.
fn text(xml: &str, element: &str) -> String {
    let open = format!("<{element}>");
    let rest = &xml[xml.find(&open).unwrap_or_else(|| panic!("no {element} in {xml}")) + open.len()..];
    rest[..rest.find('<').unwrap()].to_owned()
}

fn group(aws: &mut Aws, name: &str, more: &[(&str, &str)]) -> String {
    let vpc = Cluster::default().vpc;
    let mut pairs = vec![("Name", name)];
    for (key, value) in [("Protocol", "HTTP"), ("Port", "80"), ("VpcId", vpc.as_str()), ("TargetType", "ip")]
    {
        pairs.push((key, more.iter().find(|(k, _)| *k == key).map_or(value, |(_, v)| v)));
    }
    pairs.extend(more.iter().filter(|(k, _)| !["Protocol", "Port", "VpcId", "TargetType"].contains(k)));
    text(&elb(aws, T0, "CreateTargetGroup", &pairs).unwrap(), "TargetGroupArn")
}

/// A load balancer over the first subnets with a listener for the group.
fn attach(aws: &mut Aws, arn: &str, kind: &str, protocol: &str, subnets: usize) -> String {
    let ids = Cluster::default().subnets;
    let names: Vec<String> = (1..=subnets).map(|n| format!("Subnets.member.{n}")).collect();
    let mut pairs = vec![("Name", "lb"), ("Type", kind)];
    pairs.extend(names.iter().map(String::as_str).zip(ids.iter().map(String::as_str)));
    let lb = text(&elb(aws, T0, "CreateLoadBalancer", &pairs).unwrap(), "LoadBalancerArn");
    let listener = [
        ("LoadBalancerArn", lb.as_str()),
        ("Protocol", protocol),
        ("Port", "80"),
        ("DefaultActions.member.1.Type", "forward"),
        ("DefaultActions.member.1.TargetGroupArn", arn),
    ];
    text(&elb(aws, T0, "CreateListener", &listener).unwrap(), "ListenerArn")
}

fn register(aws: &mut Aws, now: u64, arn: &str, more: &[(&str, &str)]) -> Result<String, AwsError> {
    let keys: Vec<String> = more.iter().map(|(k, _)| format!("Targets.member.1.{k}")).collect();
    let mut pairs = vec![("TargetGroupArn", arn)];
    pairs.extend(keys.iter().map(String::as_str).zip(more.iter().map(|(_, v)| *v)));
    elb(aws, now, "RegisterTargets", &pairs)
}

fn deregister(aws: &mut Aws, now: u64, arn: &str, id: &str, port: &str) {
    let pairs = [("TargetGroupArn", arn), ("Targets.member.1.Id", id), ("Targets.member.1.Port", port)];
    elb(aws, now, "DeregisterTargets", &pairs).unwrap();
}

fn states(aws: &mut Aws, now: u64, arn: &str) -> Vec<String> {
    let xml = elb(aws, now, "DescribeTargetHealth", &[("TargetGroupArn", arn)]).unwrap();
    xml.split("<TargetHealth>")
        .skip(1)
        .map(|t| match t.find("<Reason>") {
            Some(_) => format!("{} {}", text(t, "State"), text(t, "Reason")),
            None => text(t, "State"),
        })
        .collect()
}

#[test]
fn a_target_of_an_alb_is_initial_then_healthy_then_drains_for_the_delay_and_is_gone() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    attach(&mut aws, &arn, "application", "HTTP", 3);
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.77")]).unwrap();
    assert_eq!(states(&mut aws, T0, &arn), ["initial Elb.RegistrationInProgress"]);
    assert_eq!(states(&mut aws, T0 + 1_000, &arn), ["initial Elb.InitialHealthChecking"]);
    assert_eq!(states(&mut aws, T0 + 31_000, &arn), ["healthy"]);
    deregister(&mut aws, T0 + 40_000, &arn, "192.168.0.77", "80");
    assert_eq!(states(&mut aws, T0 + 339_999, &arn), ["draining Target.DeregistrationInProgress"]);
    assert!(states(&mut aws, T0 + 340_000, &arn).is_empty());
}

#[test]
fn an_nlb_takes_three_minutes_before_its_checks_start() {
    let mut aws = aws();
    let arn = group(&mut aws, "tcp", &[("Protocol", "TCP")]);
    attach(&mut aws, &arn, "network", "TCP", 3);
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.77")]).unwrap();
    assert_eq!(states(&mut aws, T0 + 179_999, &arn), ["initial Elb.RegistrationInProgress"]);
    assert_eq!(states(&mut aws, T0 + 180_000, &arn), ["initial Elb.InitialHealthChecking"]);
}

#[test]
fn a_failing_target_is_unhealthy_after_two_checks_and_recovers_after_five() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    attach(&mut aws, &arn, "application", "HTTP", 3);
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.77")]).unwrap();
    let t1 = T0 + 100_000;
    let failing = Probe::Failing { reason: "Target.Timeout".into(), description: "Request timed out".into() };
    assert_eq!(aws.set_health("web", "192.168.0.77", None, &failing, t1), 1);
    assert_eq!(states(&mut aws, t1 + 59_999, &arn), ["healthy"]);
    assert_eq!(states(&mut aws, t1 + 60_000, &arn), ["unhealthy Target.Timeout"]);
    let t2 = t1 + 100_000;
    aws.set_health("web", "*", Some(80), &Probe::Passing, t2);
    assert_eq!(states(&mut aws, t2 + 149_999, &arn), ["unhealthy Target.FailedHealthChecks"]);
    assert_eq!(states(&mut aws, t2 + 150_000, &arn), ["healthy"]);
}

#[test]
fn a_group_without_a_listener_and_a_zone_that_is_not_enabled_leave_targets_unused() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    // the third subnet's zone isn't enabled below
    register(&mut aws, T0, &arn, &[("Id", "192.168.64.9")]).unwrap();
    assert_eq!(states(&mut aws, T0, &arn), ["unused Target.NotInUse"]);
    let listener = attach(&mut aws, &arn, "application", "HTTP", 2);
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.77")]).unwrap();
    let later = T0 + 60_000;
    assert_eq!(states(&mut aws, later, &arn), ["healthy", "unused Target.NotInUse"]);
    elb(&mut aws, later, "DeleteListener", &[("ListenerArn", &listener)]).unwrap();
    assert_eq!(states(&mut aws, later, &arn), ["unused Target.NotInUse", "unused Target.NotInUse"]);
    deregister(&mut aws, later, &arn, "192.168.0.77", "80");
    assert_eq!(states(&mut aws, later, &arn).len(), 1, "an unused target is gone at once");
}

#[test]
fn zones_are_required_outside_the_vpc_and_refused_inside() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    let mut refusal = |more: &[(&str, &str)]| {
        register(&mut aws, T0, &arn, more).map_err(|e| (e.code, e.message)).unwrap_err().1
    };
    assert_eq!(
        refusal(&[("Id", "10.4.40.87")]),
        "The Availability Zone is required for IP address '10.4.40.87' because it is not in the VPC"
    );
    assert_eq!(
        refusal(&[("Id", "192.168.0.7"), ("AvailabilityZone", "all")]),
        "The IP address '192.168.0.7' is within the VPC, and cannot have its Availability Zone overridden to 'all' from 'us-west-2a'"
    );
    assert!(refusal(&[("Id", "10.4.40.87"), ("AvailabilityZone", "us-west-2a")]).contains("must be 'all'"));
    assert!(refusal(&[("Id", "8.8.8.8"), ("AvailabilityZone", "all")]).contains("'8.8.8.8'"));
    assert_eq!(refusal(&[("Id", "fd00::1")]), "The IP address 'fd00::1' is not a valid IPv4 address");
    let off = [
        ("TargetGroupArn", arn.as_str()),
        ("Attributes.member.1.Key", "load_balancing.cross_zone.enabled"),
        ("Attributes.member.1.Value", "false"),
    ];
    elb(&mut aws, T0, "ModifyTargetGroupAttributes", &off).unwrap();
    let error =
        register(&mut aws, T0, &arn, &[("Id", "10.4.40.87"), ("AvailabilityZone", "all")]).unwrap_err();
    assert!(error.message.starts_with("When cross-zone load balancing is disabled"), "{error:?}");
    register(&mut aws, T0, &arn, &[("Id", "10.4.40.87"), ("AvailabilityZone", "us-west-2a")]).unwrap();
}

#[test]
fn instances_must_exist_and_run_and_one_bad_target_fails_the_whole_call() {
    let mut aws = aws();
    let arn = group(&mut aws, "nodes", &[("TargetType", "instance")]);
    let both = |second: &str| {
        vec![
            ("TargetGroupArn".to_owned(), arn.clone()),
            ("Targets.member.1.Id".to_owned(), "i-00000000000000001".to_owned()),
            ("Targets.member.2.Id".to_owned(), second.to_owned()),
        ]
    };
    let call = |aws: &mut Aws, second: &str| {
        let pairs = both(second);
        let pairs: Vec<(&str, &str)> = pairs.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        elb(aws, T0, "RegisterTargets", &pairs)
    };
    let absent = call(&mut aws, "i-0000000000000dead").unwrap_err();
    assert_eq!(absent.message, "The following instances do not exist: 'i-0000000000000dead'");
    aws.set_instance_state("i-00000000000000002", InstanceState::Stopped, T0);
    let stopped = call(&mut aws, "i-00000000000000002").unwrap_err();
    assert_eq!((stopped.code.as_ref(), stopped.status), ("InvalidTarget", 400));
    assert_eq!(call(&mut aws, "10.0.0.1").unwrap_err().message, "Instance ID '10.0.0.1' is not valid");
    assert!(states(&mut aws, T0, &arn).is_empty());
    aws.set_instance_state("i-00000000000000002", InstanceState::Running, T0);
    call(&mut aws, "i-00000000000000002").unwrap();
    attach(&mut aws, &arn, "application", "HTTP", 3);
    aws.set_instance_state("i-00000000000000002", InstanceState::Terminated, T0 + 60_000);
    assert_eq!(states(&mut aws, T0 + 60_000, &arn), ["healthy", "unused Target.InvalidState"]);
    assert_eq!(states(&mut aws, T0 + 120_000, &arn), ["healthy"], "terminated instances leave by themselves");
}

#[test]
fn deregistering_with_another_port_removes_nothing() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.7"), ("Port", "8080")]).unwrap();
    deregister(&mut aws, T0, &arn, "192.168.0.7", "80");
    assert_eq!(states(&mut aws, T0, &arn).len(), 1);
}

#[test]
fn a_full_group_takes_no_more_targets_but_those_it_has() {
    let mut aws = aws();
    aws.quotas.targets_per_group = 2;
    let arn = group(&mut aws, "web", &[]);
    for id in ["192.168.0.7", "192.168.0.8", "192.168.0.7"] {
        register(&mut aws, T0, &arn, &[("Id", id)]).unwrap();
    }
    let error = register(&mut aws, T0, &arn, &[("Id", "192.168.0.9")]).unwrap_err();
    assert_eq!(error.code, "TooManyTargets");
}

#[test]
fn a_foreign_group_is_a_validation_error_and_a_missing_one_is_not_found() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    let code = |aws: &mut Aws, arn: &str| {
        elb(aws, T0, "DescribeTargetHealth", &[("TargetGroupArn", arn)]).unwrap_err().code.into_owned()
    };
    assert_eq!(code(&mut aws, &arn.replace("111122223333", "999988887777")), "ValidationError");
    assert_eq!(code(&mut aws, &arn.replace("us-west-2", "us-east-1")), "ValidationError");
    elb(&mut aws, T0, "DeleteTargetGroup", &[("TargetGroupArn", &arn)]).unwrap();
    assert_eq!(code(&mut aws, &arn), "TargetGroupNotFound");
}

fn allow(aws: &mut Aws, cidr: &str, description: &str) -> Result<String, AwsError> {
    let group = Cluster::default().node_group;
    let rule = [
        ("GroupId", group.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "80"),
        ("IpPermissions.1.ToPort", "80"),
        ("IpPermissions.1.IpRanges.1.CidrIp", cidr),
        ("IpPermissions.1.IpRanges.1.Description", description),
    ];
    ec2(aws, "AuthorizeSecurityGroupIngress", &rule)
}

#[test]
fn a_rule_that_differs_in_description_or_host_bits_is_a_duplicate() {
    let mut aws = aws();
    let xml = allow(&mut aws, "100.68.0.18/18", "one").unwrap();
    assert_eq!(text(&xml, "cidrIpv4"), "100.68.0.0/18");
    let error = allow(&mut aws, "100.68.0.0/18", "two").unwrap_err();
    assert_eq!(
        error.message,
        "the specified rule \"peer: 100.68.0.0/18, TCP, from port: 80, to port: 80, ALLOW\" already exists"
    );
}

#[test]
fn revoking_the_unknown_fails_outside_a_default_vpc_and_succeeds_in_one() {
    let mut aws = aws();
    let group = Cluster::default().node_group;
    let rule = [
        ("GroupId", group.as_str()),
        ("IpPermissions.1.IpProtocol", "tcp"),
        ("IpPermissions.1.FromPort", "80"),
        ("IpPermissions.1.ToPort", "80"),
        ("IpPermissions.1.IpRanges.1.CidrIp", "10.0.0.0/8"),
    ];
    let error = ec2(&mut aws, "RevokeSecurityGroupIngress", &rule).unwrap_err();
    assert_eq!(error.code, "InvalidPermission.NotFound");
    aws.vpcs.get_mut(&Cluster::default().vpc).unwrap().is_default = true;
    let xml = ec2(&mut aws, "RevokeSecurityGroupIngress", &rule).unwrap();
    assert_eq!(text(&xml[xml.find("unknownIpPermissionSet").unwrap()..], "cidrIp"), "10.0.0.0/8");
}

#[test]
fn sixty_rules_of_each_family_are_the_most_and_references_count_in_both() {
    let mut aws = aws();
    for n in 0..60u8 {
        allow(&mut aws, &format!("10.{n}.0.0/16"), "x").unwrap();
    }
    assert_eq!(allow(&mut aws, "10.99.0.0/16", "x").unwrap_err().code, "RulesPerSecurityGroupLimitExceeded");
    let (group, other) = (Cluster::default().node_group, Cluster::default().lb_group);
    let mut with = |name: &str, value: &str| {
        let rule = [
            ("GroupId", group.as_str()),
            ("IpPermissions.1.IpProtocol", "tcp"),
            ("IpPermissions.1.FromPort", "80"),
            ("IpPermissions.1.ToPort", "80"),
            (name, value),
        ];
        ec2(&mut aws, "AuthorizeSecurityGroupIngress", &rule).map_err(|e| e.code.into_owned())
    };
    with("IpPermissions.1.Ipv6Ranges.1.CidrIpv6", "fd00::/64").unwrap();
    let reference = with("IpPermissions.1.Groups.1.GroupId", &other);
    assert_eq!(reference.unwrap_err(), "RulesPerSecurityGroupLimitExceeded");
}

#[test]
fn a_seeded_cluster_finds_pods_on_prefixes_of_its_nodes() {
    let aws = aws();
    let pod = Ipv4Addr::new(10, 244, 1, 9).into();
    let eni = crate::eni_of(&aws, &Cluster::default().vpc, pod).unwrap();
    assert_eq!(aws.enis[&eni].instance.as_deref(), Some("i-00000000000000002"));
    assert_eq!(aws.subnet_of(&Cluster::default().vpc, pod).unwrap().zone, "us-west-2a");
}

fn signed(world: &World, key: &str, service: &str, form: &str) -> crate::world::Reply {
    let header = format!(
        "AWS4-HMAC-SHA256 Credential={key}/20261124/us-west-2/{service}/aws4_request, SignedHeaders=host"
    );
    world.answer(Request { authorization: Some(&header), body: form.as_bytes() })
}

const VPCS: &str = "Action=DescribeVpcs&Version=2016-11-15&VpcId.1=vpc-1";
const GROUPS: &str = "Action=DescribeTargetGroups&Version=2015-12-01";

fn frozen() -> Options {
    Options { scale: 0.0, ..Options::default() }
}

#[test]
fn elb_gives_forty_calls_then_ten_a_second_and_ec2_says_503() {
    let world = World::new(Options { throttle: true, ..frozen() });
    let elb = |world: &World| signed(world, "111122223333", "elasticloadbalancing", GROUPS).status;
    assert_eq!((0..40).filter(|_| elb(&world) == 200).count(), 40);
    assert_eq!(elb(&world), 400);
    assert_eq!(
        signed(&world, "444455556666", "elasticloadbalancing", GROUPS).status,
        200,
        "other accounts go on"
    );
    world.advance(None, std::time::Duration::from_secs(1));
    assert_eq!((0..40).filter(|_| elb(&world) == 200).count(), 10);
    let answers: Vec<_> = (0..101).map(|_| signed(&world, "111122223333", "ec2", VPCS)).collect();
    let last = answers.last().unwrap();
    assert_eq!((answers[99].status, last.status), (400, 503), "an unknown VPC, then no more");
    assert!(last.body.contains("<Code>RequestLimitExceeded</Code>"), "{}", last.body);
}

#[test]
fn faults_hit_the_calls_that_they_name_and_as_often_as_they_say() {
    let world = World::new(frozen());
    world.add_fault(
        Fault::new(Effect::Unavailable).account("111122223333").action("Describe*").skip(1).times(2),
    );
    let statuses: Vec<u16> =
        (0..4).map(|_| signed(&world, "111122223333", "elasticloadbalancing", GROUPS).status).collect();
    assert_eq!(statuses, [200, 503, 503, 200]);
    assert!(world.faults().is_empty());
    world.add_fault(Fault::new(Effect::LostResponse).times(1));
    assert_eq!(signed(&world, "111122223333", "elasticloadbalancing", GROUPS).wire, Wire::Close);
    let codes: Vec<Option<String>> =
        world.journal(Some("111122223333")).into_iter().map(|c| c.code).collect();
    assert_eq!(codes.last().unwrap().as_deref(), Some("LostResponse"));
    assert_eq!(codes.len(), 5);
}

#[test]
fn a_seeded_share_of_calls_fails_the_same_way_twice() {
    let run = || {
        let world = World::new(Options { seed: 7, ..frozen() });
        world.add_fault(Fault::new(Effect::Throttle).probability(0.3));
        (0..50)
            .map(|_| signed(&world, "111122223333", "elasticloadbalancing", GROUPS).status)
            .collect::<Vec<_>>()
    };
    let first = run();
    assert_eq!(first, run());
    assert!((5..30).contains(&first.iter().filter(|s| **s == 400).count()), "{first:?}");
}

#[test]
fn a_role_wants_trust_and_its_external_id_and_its_session_expires() {
    let world = World::new(frozen());
    let assume = |more: &str| {
        let form = format!(
            "Action=AssumeRole&Version=2011-06-15&RoleArn=arn%3Aaws%3Aiam%3A%3A999988887777%3Arole%2Fr&RoleSessionName=ss{more}"
        );
        signed(&world, "111122223333", "sts", &form)
    };
    assert_eq!(assume("").status, 403, "a missing role");
    world.add_role(Role {
        arn: "arn:aws:iam::999988887777:role/r".into(),
        trusts: vec!["111122223333".into()],
        external_id: Some("ext".into()),
        max_duration: 0,
    });
    assert_eq!(assume("").status, 403);
    let empty = assume("&ExternalId=");
    assert!(empty.body.contains("at 'externalId' failed to satisfy constraint"), "{}", empty.body);
    let answer = assume("&ExternalId=ext");
    let key = text(&answer.body, "AccessKeyId");
    let who = "Action=GetCallerIdentity&Version=2011-06-15";
    assert_eq!(text(&signed(&world, &key, "sts", who).body, "Account"), "999988887777");
    world.advance(None, std::time::Duration::from_secs(3600));
    assert_eq!(text(&signed(&world, &key, "sts", who).body, "Code"), "ExpiredToken");
}

#[test]
fn reads_miss_what_was_made_within_the_stale_window() {
    let mut aws = aws();
    aws.timing.stale_ms = 2_000;
    let arn = group(&mut aws, "web", &[]);
    register(&mut aws, T0 + 5_000, &arn, &[("Id", "192.168.0.7")]).unwrap();
    assert!(states(&mut aws, T0 + 6_999, &arn).is_empty());
    assert_eq!(states(&mut aws, T0 + 7_000, &arn).len(), 1);
}

#[test]
fn a_request_without_a_signature_or_with_the_classic_version_is_refused() {
    let world = World::new(frozen());
    let bare = world.answer(Request { authorization: None, body: GROUPS.as_bytes() });
    assert_eq!((bare.status, text(&bare.body, "Code").as_str()), (403, "MissingAuthenticationToken"));
    let classic = "Action=DescribeLoadBalancers&Version=2012-06-01";
    assert_eq!(signed(&world, "111122223333", "elasticloadbalancing", classic).status, 400);
}
