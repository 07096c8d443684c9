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
fn stale_reads_see_everything_as_it_was_a_while_ago_what_is_gone_included() {
    let mut aws = aws();
    aws.timing.stale_ms = 2_000;
    let arn = group(&mut aws, "web", &[]);
    register(&mut aws, T0 + 5_000, &arn, &[("Id", "192.168.0.7")]).unwrap();
    assert!(states(&mut aws, T0 + 6_999, &arn).is_empty());
    assert_eq!(states(&mut aws, T0 + 7_000, &arn).len(), 1);
    let target = [("TargetGroupArn", arn.as_str()), ("Targets.member.1.Id", "192.168.0.7")];
    elb(&mut aws, T0 + 9_000, "DeregisterTargets", &target).unwrap();
    assert_eq!(states(&mut aws, T0 + 10_999, &arn).len(), 1);
    assert!(states(&mut aws, T0 + 11_000, &arn).is_empty());
}

#[test]
fn a_request_without_a_signature_or_with_the_classic_version_is_refused() {
    let world = World::new(frozen());
    let bare = world.answer(Request { authorization: None, body: GROUPS.as_bytes() });
    assert_eq!((bare.status, text(&bare.body, "Code").as_str()), (403, "MissingAuthenticationToken"));
    let classic = "Action=DescribeLoadBalancers&Version=2012-06-01";
    assert_eq!(signed(&world, "111122223333", "elasticloadbalancing", classic).status, 400);
}

/// Registers so many addresses from `192.168.BLOCK.1` on; the code of the error if there is one.
fn many(aws: &mut Aws, arn: &str, block: u8, count: u8) -> Result<(), String> {
    let targets: Vec<(String, String)> =
        (1..=count).map(|n| (format!("Targets.member.{n}.Id"), format!("192.168.{block}.{n}"))).collect();
    let mut pairs = vec![("TargetGroupArn", arn)];
    pairs.extend(targets.iter().map(|(k, v)| (k.as_str(), v.as_str())));
    elb(aws, T0, "RegisterTargets", &pairs).map(drop).map_err(|error| error.code.to_string())
}

#[test]
fn load_balancers_have_quotas_of_their_own_by_zone_and_across_zones_also_when_a_full_group_is_attached() {
    let mut aws = aws();
    aws.quotas.targets_per_nlb_zone = 10;
    aws.quotas.targets_per_nlb_cross_zone = 15;
    aws.quotas.targets_per_alb = 12;
    let refused = Err("TooManyTargets".to_owned());
    let tcp = group(&mut aws, "tcp", &[("Protocol", "TCP")]);
    attach(&mut aws, &tcp, "network", "TCP", 3);
    many(&mut aws, &tcp, 0, 10).unwrap();
    assert_eq!(many(&mut aws, &tcp, 1, 1), refused, "the eleventh of its zone");
    many(&mut aws, &tcp, 32, 5).unwrap();
    let cross = [
        ("TargetGroupArn", tcp.as_str()),
        ("Attributes.member.1.Key", "load_balancing.cross_zone.enabled"),
        ("Attributes.member.1.Value", "true"),
    ];
    elb(&mut aws, T0, "ModifyTargetGroupAttributes", &cross).unwrap();
    assert_eq!(many(&mut aws, &tcp, 33, 1), refused, "the sixteenth across zones");

    let web = group(&mut aws, "web", &[]);
    many(&mut aws, &web, 0, 13).unwrap();
    let balancer = aws.load_balancers.values().next().unwrap().arn.clone();
    aws.load_balancers.get_mut(&balancer).unwrap().name = "other".into();
    let ids = Cluster::default().subnets;
    let pairs = [("Name", "alb"), ("Subnets.member.1", &ids[0]), ("Subnets.member.2", &ids[1])];
    let alb = text(&elb(&mut aws, T0, "CreateLoadBalancer", &pairs).unwrap(), "LoadBalancerArn");
    let listener = [
        ("LoadBalancerArn", alb.as_str()),
        ("Protocol", "HTTP"),
        ("Port", "80"),
        ("DefaultActions.member.1.Type", "forward"),
        ("DefaultActions.member.1.TargetGroupArn", &web),
    ];
    assert_eq!(elb(&mut aws, T0, "CreateListener", &listener).unwrap_err().code, "TooManyTargets");
    aws.quotas.targets_per_alb = 13;
    elb(&mut aws, T0, "CreateListener", &listener).unwrap();
    assert_eq!(many(&mut aws, &web, 1, 1), refused);
    aws.quotas.registrations_per_alb = 1;
    aws.quotas.targets_per_alb = 20;
    let pairs = [
        ("TargetGroupArn", web.as_str()),
        ("Targets.member.1.Id", "192.168.0.1"),
        ("Targets.member.1.Port", "81"),
    ];
    let error = elb(&mut aws, T0, "RegisterTargets", &pairs).unwrap_err();
    assert_eq!(error.code, "TooManyRegistrationsForTargetId");
}

#[test]
fn an_unhealthy_target_of_an_nlb_keeps_its_connections_for_the_draining_interval() {
    let mut aws = aws();
    let arn = group(&mut aws, "tcp", &[("Protocol", "TCP")]);
    attach(&mut aws, &arn, "network", "TCP", 3);
    let name = |n: usize, field: &str| format!("Attributes.member.{n}.{field}");
    let (k1, v1, k2, v2) = (name(1, "Key"), name(1, "Value"), name(2, "Key"), name(2, "Value"));
    let pairs = [
        ("TargetGroupArn", arn.as_str()),
        (&k1, "target_health_state.unhealthy.connection_termination.enabled"),
        (&v1, "false"),
        (&k2, "target_health_state.unhealthy.draining_interval_seconds"),
        (&v2, "60"),
    ];
    elb(&mut aws, T0, "ModifyTargetGroupAttributes", &pairs).unwrap();
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.7")]).unwrap();
    let healthy = T0 + 180_000 + 30_000;
    assert_eq!(states(&mut aws, healthy, &arn), ["healthy"]);
    let probe = Probe::Failing { reason: "Target.Timeout".into(), description: "Request timed out".into() };
    aws.set_health("tcp", "*", None, &probe, healthy);
    let due = healthy + 2 * 30_000;
    assert_eq!(states(&mut aws, due - 1, &arn), ["healthy"]);
    assert_eq!(states(&mut aws, due, &arn), ["unhealthy.draining Target.FailedHealthChecks"]);
    assert_eq!(states(&mut aws, due + 60_000, &arn), ["unhealthy Target.Timeout"]);
}

#[test]
fn a_quic_server_id_goes_to_no_other_target_for_six_hours_and_not_behind_security_groups() {
    let mut aws = aws();
    let arn = group(&mut aws, "quic", &[("Protocol", "QUIC")]);
    let id = ("QuicServerId", "0x00000000000000aa");
    register(&mut aws, T0, &arn, &[("Id", "192.168.0.7"), id]).unwrap();
    deregister(&mut aws, T0 + 1_000, &arn, "192.168.0.7", "80");
    let soon = register(&mut aws, T0 + 2_000, &arn, &[("Id", "192.168.0.8"), id]).unwrap_err();
    assert!(soon.message.contains("6 hours"), "{}", soon.message);
    register(&mut aws, T0 + 2_000, &arn, &[("Id", "192.168.0.7"), id]).unwrap();
    deregister(&mut aws, T0 + 3_000, &arn, "192.168.0.7", "80");
    register(&mut aws, T0 + 3_000 + 6 * 3_600_000, &arn, &[("Id", "192.168.0.8"), id]).unwrap();

    let cluster = Cluster::default();
    let pairs = [
        ("Name", "nlb"),
        ("Type", "network"),
        ("Subnets.member.1", &cluster.subnets[0]),
        ("SecurityGroups.member.1", &cluster.lb_group),
    ];
    let nlb = text(&elb(&mut aws, T0, "CreateLoadBalancer", &pairs).unwrap(), "LoadBalancerArn");
    let listener = [
        ("LoadBalancerArn", nlb.as_str()),
        ("Protocol", "QUIC"),
        ("Port", "443"),
        ("DefaultActions.member.1.TargetGroupArn", &arn),
    ];
    let error = elb(&mut aws, T0, "CreateListener", &listener).unwrap_err();
    assert_eq!(error.code, "InvalidConfigurationRequest");
}

#[test]
fn a_listener_may_be_pointed_elsewhere_and_zones_switched_off() {
    let mut aws = aws();
    let (blue, green) = (group(&mut aws, "blue", &[]), group(&mut aws, "green", &[]));
    let listener = attach(&mut aws, &blue, "application", "HTTP", 3);
    register(&mut aws, T0, &blue, &[("Id", "192.168.64.7")]).unwrap();
    let balancer = aws.listeners[&listener].load_balancer.clone();
    let ids = Cluster::default().subnets;
    let pairs = [
        ("LoadBalancerArn", balancer.as_str()),
        ("Subnets.member.1", &ids[0]),
        ("Subnets.member.2", &ids[1]),
    ];
    elb(&mut aws, T0, "SetSubnets", &pairs).unwrap();
    let state = |aws: &mut Aws, arn: &str| {
        elb(aws, T0 + 60_000, "DescribeTargetHealth", &[("TargetGroupArn", arn)]).unwrap()
    };
    assert!(state(&mut aws, &blue).contains("Target is in an Availability Zone that is not enabled"));
    let pairs = [("ListenerArn", listener.as_str()), ("DefaultActions.member.1.TargetGroupArn", &green)];
    elb(&mut aws, T0, "ModifyListener", &pairs).unwrap();
    assert!(state(&mut aws, &blue).contains("not configured to receive traffic"));
    assert_eq!(aws.target_groups[&green].load_balancer, Some(balancer));
}

#[test]
fn anomalies_are_told_when_asked_for_and_overrides_while_a_zone_is_shifted_away() {
    let mut aws = aws();
    let arn = group(&mut aws, "web", &[]);
    attach(&mut aws, &arn, "application", "HTTP", 3);
    many(&mut aws, &arn, 0, 2).unwrap();
    many(&mut aws, &arn, 32, 1).unwrap();
    let read = |aws: &mut Aws| {
        let pairs = [("TargetGroupArn", arn.as_str()), ("Include.member.1", "AnomalyDetection")];
        elb(aws, T0 + 60_000, "DescribeTargetHealth", &pairs).unwrap()
    };
    assert_eq!(read(&mut aws).matches("<AnomalyDetection><Result>normal</Result>").count(), 3);
    assert_eq!(
        elb(&mut aws, T0 + 60_000, "DescribeTargetHealth", &[("TargetGroupArn", &arn)])
            .unwrap()
            .matches("Anomaly")
            .count(),
        0
    );
    aws.shifted_zones.insert("us-west-2b".into());
    let answer = read(&mut aws);
    assert_eq!((answer.matches("zonal_shift_active").count(), answer.matches("no_override").count()), (1, 2));
}

#[test]
fn a_prefix_list_counts_with_its_size_and_groups_of_peered_vpcs_can_be_named() {
    let mut aws = aws();
    let cluster = Cluster::default();
    let allow = |aws: &mut Aws, what: &str, value: &str| {
        let name = format!("IpPermissions.1.{what}");
        let pairs =
            [("GroupId", cluster.node_group.as_str()), ("IpPermissions.1.IpProtocol", "-1"), (&name, value)];
        ec2(aws, "AuthorizeSecurityGroupIngress", &pairs).map(drop).map_err(|error| error.code.to_string())
    };
    let list = "PrefixListIds.1.PrefixListId";
    assert_eq!(allow(&mut aws, list, "pl-1"), Err("InvalidPrefixListID.NotFound".to_owned()));
    aws.prefix_lists.extend([("pl-1".to_owned(), 59), ("pl-2".to_owned(), 2)]);
    allow(&mut aws, list, "pl-1").unwrap();
    assert_eq!(allow(&mut aws, list, "pl-2"), Err("RulesPerSecurityGroupLimitExceeded".to_owned()));
    let other = ec2(&mut aws, "CreateVpc", &[("CidrBlock", "172.31.0.0/16")]).unwrap();
    let vpc = text(&other, "vpcId");
    aws.add_security_group("sg-0ffffffffffffffff", &vpc, "theirs", Default::default());
    let group = "Groups.1.GroupId";
    assert_eq!(allow(&mut aws, group, "sg-0ffffffffffffffff"), Err("InvalidGroup.NotFound".to_owned()));
    aws.peerings.insert((vpc, cluster.vpc.clone()));
    allow(&mut aws, group, "sg-0ffffffffffffffff").unwrap();
}

#[test]
fn accounts_have_their_own_clock_their_own_throttling_and_outages_that_end() {
    let world = World::new(frozen());
    let (one, two) = ("111122223333", "444455556666");
    let before = world.now_of(two);
    world.advance(Some(one), std::time::Duration::from_secs(60));
    assert_eq!((world.now_of(one) - before, world.now_of(two)), (60_000, before));
    world.throttle(Some(one), true);
    let limited = |account: &str| {
        (0..50).filter(|_| signed(&world, account, "elasticloadbalancing", GROUPS).status == 400).count()
    };
    assert_eq!((limited(one), limited(two)), (10, 0));
    let seconds = std::time::Duration::from_secs;
    world.add_fault(Fault::new(Effect::Unavailable).account(two).between(seconds(10), seconds(5)));
    let at = |more: u64| {
        world.advance(Some(two), seconds(more));
        signed(&world, two, "elasticloadbalancing", GROUPS).status
    };
    assert_eq!((at(0), at(10), at(4), at(1)), (200, 503, 503, 200));
    assert!(world.faults().is_empty());
}

#[test]
fn a_schedule_of_faults_is_the_same_for_the_same_seed_and_over_at_its_end() {
    let length = std::time::Duration::from_secs(60);
    let schedule = Fault::schedule(7, "111122223333", 20, length);
    assert_eq!(schedule, Fault::schedule(7, "111122223333", 20, length));
    assert_ne!(schedule, Fault::schedule(8, "111122223333", 20, length));
    assert!(schedule.iter().all(|f| f.after_ms + f.for_ms.unwrap() <= 60_000));
    let run = || {
        let world = World::new(frozen());
        schedule.iter().cloned().for_each(|fault| world.add_fault(fault));
        let calls = (0..61).map(|_| {
            world.advance(None, std::time::Duration::from_secs(1));
            let reply = signed(&world, "111122223333", "elasticloadbalancing", GROUPS);
            (reply.status, reply.wire)
        });
        calls.collect::<Vec<_>>()
    };
    let first = run();
    assert_eq!(first, run());
    assert!(first.iter().any(|(status, _)| *status != 200));
    assert_eq!(first.last(), Some(&(200, Wire::Answer)));
}

#[test]
fn a_call_whose_effect_can_be_seen_is_in_the_journal() {
    let world = World::new(Options::fast());
    world.with(crate::DEFAULT_ACCOUNT, "us-west-2", |aws, _| {
        aws.seed_cluster(&Cluster::default());
        aws.quotas.target_groups = 10_000;
    });
    let vpc = Cluster::default().vpc;
    std::thread::scope(|threads| {
        let calls = threads.spawn(|| {
            for n in 0..2_000 {
                let form = format!(
                    "Action=CreateTargetGroup&Version=2015-12-01&Name=g{n}&Protocol=HTTP&Port=80&VpcId={vpc}&TargetType=ip"
                );
                let reply = signed(&world, "test", "elasticloadbalancing", &form);
                assert_eq!(reply.status, 200, "{}", reply.body);
            }
        });
        while !calls.is_finished() {
            let made = world.with(crate::DEFAULT_ACCOUNT, "us-west-2", |aws, _| aws.target_groups.len());
            let told = world.journal(None).len();
            assert!(told >= made, "{made} target groups, and {told} calls");
        }
    });
}

/// Forms of all kinds against a world with things in it; an answer is XML of the protocol whatever comes.
#[test]
fn fuzz_wire() {
    let world = World::new(Options { journal_limit: 10, ..Options::fast() });
    world.with(crate::DEFAULT_ACCOUNT, "us-west-2", |aws, _| aws.seed_cluster(&Cluster::default()));
    let vpc = Cluster::default().vpc;
    let seeds = [
        format!("Action=CreateTargetGroup&Version=2015-12-01&Name=web&Protocol=HTTP&Port=80&VpcId={vpc}&TargetType=ip"),
        "Action=DescribeTargetGroups&Version=2015-12-01&Names.member.1=web&PageSize=1&Marker=x".to_owned(),
        "Action=RegisterTargets&Version=2015-12-01&TargetGroupArn=arn&Targets.member.1.Id=10.0.0.1&Targets.member.1.Port=80".to_owned(),
        "Action=AuthorizeSecurityGroupIngress&Version=2016-11-15&GroupId=sg-0a0000000000000a1&IpPermissions.1.IpProtocol=tcp&IpPermissions.1.FromPort=1&IpPermissions.1.ToPort=2&IpPermissions.1.IpRanges.1.CidrIp=10.0.0.0%2F8".to_owned(),
        "Action=DescribeSecurityGroupRules&Version=2016-11-15&Filter.1.Name=group-id&Filter.1.Value.1=sg-0a0000000000000a1&MaxResults=5&NextToken=x".to_owned(),
        "Action=DescribeInstances&Version=2016-11-15&InstanceId.1=i-1".to_owned(),
        "Action=AssumeRole&Version=2011-06-15&RoleArn=arn:aws:iam::111122223333:role/a&RoleSessionName=x".to_owned(),
    ];
    let seeds: Vec<&[u8]> = seeds.iter().map(String::as_bytes).collect();
    let parts = [
        "&",
        "=",
        "%",
        "%00",
        "%zz",
        ".member.1",
        ".1",
        "Action=",
        "DescribeTargetHealth",
        "ModifySecurityGroupRules",
        "RunInstances",
        "MaxResults=",
        "CreateListener",
        "&amp;<",
    ];
    tgb_fuzz::fuzz("wire", &seeds, &parts, |input| {
        let has = |version: &[u8]| input.windows(version.len()).any(|part| part == version);
        let service = match (has(b"2016-11-15"), has(b"2011-06-15")) {
            (true, _) => "ec2",
            (_, true) => "sts",
            _ => "elasticloadbalancing",
        };
        let scope = format!("AWS4-HMAC-SHA256 Credential=test/20261124/us-west-2/{service}/aws4_request");
        let reply = world.answer(Request { authorization: Some(&scope), body: input });
        let name = reply.body.find("<").and_then(|at| reply.body.get(at..));
        assert!(name.is_some() && reply.body.trim_end().ends_with('>'), "{}", reply.body);
        let code =
            reply.body.split("<Code>").nth(1).and_then(|rest| rest.split('<').next()).unwrap_or_default();
        (reply.status, code.to_owned(), name.unwrap_or_default().chars().take(20).collect::<String>())
    });
}

#[test]
fn a_rule_attaches_its_target_group_until_it_is_deleted() {
    let mut aws = aws();
    let (web, api) = (group(&mut aws, "web", &[]), group(&mut aws, "api", &[]));
    let listener = attach(&mut aws, &web, "application", "HTTP", 3);
    let rule = [
        ("ListenerArn", listener.as_str()),
        ("Priority", "10"),
        ("Conditions.member.1.Field", "path-pattern"),
        ("Conditions.member.1.PathPatternConfig.Values.member.1", "/api/*"),
        ("Actions.member.1.Type", "forward"),
        ("Actions.member.1.TargetGroupArn", &api),
    ];
    let made = elb(&mut aws, T0, "CreateRule", &rule).unwrap();
    assert!(
        made.contains("<PathPatternConfig><Values><member>/api/*</member></Values></PathPatternConfig>"),
        "{made}"
    );
    assert_eq!(elb(&mut aws, T0, "CreateRule", &rule).unwrap_err().code, "PriorityInUse");
    register(&mut aws, T0, &api, &[("Id", "192.168.0.7")]).unwrap();
    assert_eq!(states(&mut aws, T0 + 60_000, &api), ["healthy"]);
    let all = elb(&mut aws, T0, "DescribeRules", &[("ListenerArn", &listener)]).unwrap();
    assert_eq!(all.matches("<RuleArn>").count(), 2);
    let default =
        text(all.rsplit("<RuleArn>").next().map(|t| format!("<RuleArn>{t}")).as_deref().unwrap(), "RuleArn");
    let delete = |aws: &mut Aws, arn: &str| {
        elb(aws, T0, "DeleteRule", &[("RuleArn", arn)]).map_err(|e| e.code.to_string())
    };
    assert_eq!(delete(&mut aws, &default).unwrap_err(), "OperationNotPermitted");
    delete(&mut aws, &text(&made, "RuleArn")).unwrap();
    assert_eq!(states(&mut aws, T0 + 60_000, &api), ["unused Target.NotInUse"]);
}
