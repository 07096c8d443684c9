"""Is awsim's wire format AWS's? Runs boto3, the aws command line and moto against it.

    fidelity.py AWSIM_BINARY
    fidelity.py --replay FILE…

- Every answer is compared with botocore's service model: no element that the model doesn't know, and every list and
  structure where the model has it. Every request is: only parameters that the model knows, and in requests that succeeded
  all required ones, with values that it allows.
- The aws command line does a walkthrough.
- What moto can express runs on both, with the same outcome; each known difference is in docs/awsim.md.

--replay does the first for what `awsim --record` has written, as the product's own requests in the e2e tests.

Prints one line per check and ends with 1 if one fails.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import xml.etree.ElementTree as ET

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import ClientError

REGION = "us-west-2"
FAILED = []


def check(what, ok, detail=""):
    print(("ok    " if ok else "FAIL  ") + what + ("" if ok else f": {detail}"), flush=True)
    if not ok:
        FAILED.append(what)


class Witness:
    """Compares each answer's XML with the model of its operation."""

    def __init__(self):
        self.problems, self.seen = set(), set()

    def attach(self, client):
        service = client.meta.service_model

        def after(http_response, model, **_):
            self.answer(service, model, http_response)

        client.meta.events.register("after-call." + service.service_id.hyphenize(), after)

    def answer(self, service, model, http):
        self.seen.add((service.service_name, model.name))
        where = f"{service.service_name}.{model.name}"
        try:
            root = ET.fromstring(http.content.decode())
        except ET.ParseError as error:
            self.problems.add(f"{where}: no XML: {error}")
            return
        for e in root.iter():
            e.tag = re.sub(r"^\{.*\}", "", e.tag)
        if http.status_code >= 300:
            want = {"Response"} if service.protocol == "ec2" else {"ErrorResponse"}
            if root.tag not in want:
                self.problems.add(f"{where}: error in <{root.tag}>")
            return
        if root.tag != model.name + "Response":
            self.problems.add(f"{where}: answer in <{root.tag}>")
        if not http.headers.get("x-amzn-requestid"):
            self.problems.add(f"{where}: no x-amzn-requestid")
        shape = model.output_shape
        if service.protocol == "ec2":
            known = {"requestId", "return"}
            children = [c for c in root if c.tag not in known or (shape and c.tag in names(shape))]
            if shape is None and children:
                self.problems.add(f"{where}: has <{children[0].tag}>, the model has no output")
            elif shape is not None:
                self.structure(where, shape, children)
            return
        result = root.find(model.name + "Result")
        if result is None:
            self.problems.add(f"{where}: no {model.name}Result")
        elif shape is not None:
            self.structure(where, shape, list(result))

    def structure(self, where, shape, children):
        members = names(shape)
        seen = set()
        for c in children:
            if c.tag not in members:
                self.problems.add(f"{where}: unknown <{c.tag}>")
                continue
            if c.tag in seen:
                self.problems.add(f"{where}: twice <{c.tag}>")
            seen.add(c.tag)
            self.value(f"{where}/{c.tag}", members[c.tag], c)
        for name in shape.required_members:
            wire = shape.members[name].serialization.get("name", name)
            if wire not in seen:
                self.problems.add(f"{where}: no <{wire}>, which is required")

    def value(self, where, shape, element):
        if shape.type_name == "structure":
            self.structure(where, shape, list(element))
        elif shape.type_name == "list":
            item = shape.member.serialization.get("name", "member")
            for c in element:
                if c.tag != item:
                    self.problems.add(f"{where}: <{c.tag}> in a list of <{item}>")
                else:
                    self.value(where, shape.member, c)
        elif shape.type_name in ("integer", "long"):
            if not re.fullmatch(r"-?\d+", element.text or ""):
                self.problems.add(f"{where}: '{element.text}' is no number")
        elif shape.type_name == "boolean":
            if element.text not in ("true", "false"):
                self.problems.add(f"{where}: '{element.text}' is no boolean")
        elif shape.type_name == "timestamp":
            if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", element.text or ""):
                self.problems.add(f"{where}: '{element.text}' is no time")
        elif len(element):
            self.problems.add(f"{where}: elements in a text")
        elif shape.enum and element.text not in shape.enum:
            self.problems.add(f"{where}: '{element.text}' isn't one of {shape.enum}")


def names(shape):
    return {m.serialization.get("name", n): m for n, m in shape.members.items()}


def clients(endpoint, account, witness=None):
    session = boto3.Session(
        aws_access_key_id=account, aws_secret_access_key="x", region_name=REGION
    )
    config = Config(retries={"total_max_attempts": 1})
    made = [session.client(n, endpoint_url=endpoint, config=config) for n in ("elbv2", "ec2", "sts")]
    if witness:
        for c in made:
            witness.attach(c)
    return made


def code(call):
    try:
        call()
        return "ok"
    except ClientError as e:
        return e.response["Error"]["Code"]


def text(call):
    try:
        call()
        return "ok"
    except ClientError as e:
        return e.response["Error"]["Message"]


def rule(port, cidr=None, group=None, description=None, to=None):
    p = {"IpProtocol": "tcp", "FromPort": port, "ToPort": to or port}
    more = {"Description": description} if description else {}
    if cidr and ":" in cidr:
        p["Ipv6Ranges"] = [{"CidrIpv6": cidr, **more}]
    elif cidr:
        p["IpRanges"] = [{"CidrIp": cidr, **more}]
    if group:
        p["UserIdGroupPairs"] = [{"GroupId": group, **more}]
    return p


def scenario(elb, ec2, sts):
    """What both emulators can express; returns named outcomes that don't hold ids."""
    out = {}
    out["account"] = sts.get_caller_identity()["Account"]
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    out["vpc cidrs"] = [
        a["CidrBlock"] for a in ec2.describe_vpcs(VpcIds=[vpc])["Vpcs"][0]["CidrBlockAssociationSet"]
    ]
    out["unknown vpc"] = code(lambda: ec2.describe_vpcs(VpcIds=["vpc-00000000000000000"]))
    out["unknown vpc text"] = text(lambda: ec2.describe_vpcs(VpcIds=["vpc-00000000000000000"]))
    out["filtered vpc"] = ec2.describe_vpcs(Filters=[{"Name": "vpc-id", "Values": ["vpc-1"]}])["Vpcs"]
    subnets = []
    for n, zone in enumerate("ab"):
        s = ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{n}.0/24", AvailabilityZone=REGION + zone)
        subnets.append(s["Subnet"]["SubnetId"])
    found = ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": [vpc]}])["Subnets"]
    out["subnets"] = sorted((s["CidrBlock"], s["AvailabilityZone"]) for s in found)
    out["subnet conflict"] = code(
        lambda: ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/25", AvailabilityZone=REGION + "a")
    )
    out["subnet range"] = code(
        lambda: ec2.create_subnet(VpcId=vpc, CidrBlock="10.9.0.0/24", AvailabilityZone=REGION + "a")
    )
    # security groups
    a = ec2.create_security_group(GroupName="a", Description="a", VpcId=vpc)["GroupId"]
    b = ec2.create_security_group(GroupName="b", Description="b", VpcId=vpc)["GroupId"]
    out["group twice"] = code(lambda: ec2.create_security_group(GroupName="a", Description="a", VpcId=vpc))
    allow = lambda *r: ec2.authorize_security_group_ingress(GroupId=a, IpPermissions=list(r))
    take = lambda *r: ec2.revoke_security_group_ingress(GroupId=a, IpPermissions=list(r))
    made = allow(rule(80, "10.0.0.0/16", description="one"), rule(81, group=b), rule(82, "fd00::/64"))
    out["authorized"] = sorted(
        (r["FromPort"], r.get("CidrIpv4"), r.get("CidrIpv6"), "ReferencedGroupInfo" in r, r.get("Description"))
        for r in made["SecurityGroupRules"]
    )
    out["duplicate"] = code(lambda: allow(rule(80, "10.0.0.0/16", description="one")))
    out["duplicate of a reference"] = code(lambda: allow(rule(81, group=b)))
    out["revoke missing"] = code(lambda: take(rule(99, "10.0.0.0/16")))
    out["revoked"] = code(lambda: take(rule(82, "fd00::/64")))
    seen = ec2.describe_security_groups(GroupIds=[a])["SecurityGroups"][0]
    out["permissions"] = sorted(
        (p["FromPort"], [c["CidrIp"] for c in p["IpRanges"]], len(p["UserIdGroupPairs"]))
        for p in seen["IpPermissions"]
    )
    out["egress"] = [[c["CidrIp"] for c in p["IpRanges"]] for p in seen["IpPermissionsEgress"]]
    rules = ec2.describe_security_group_rules(Filters=[{"Name": "group-id", "Values": [a]}])["SecurityGroupRules"]
    out["rules"] = sorted((r["IsEgress"], r["FromPort"], r["IpProtocol"]) for r in rules)
    ids = [r["SecurityGroupRuleId"] for r in rules if r["FromPort"] == 80]
    out["revoke by id"] = code(lambda: ec2.revoke_security_group_ingress(GroupId=a, SecurityGroupRuleIds=ids))
    out["delete referenced"] = code(lambda: ec2.delete_security_group(GroupId=b))
    out["unknown group"] = code(lambda: ec2.describe_security_groups(GroupIds=["sg-00000000000000000"]))
    out["bad cidr"] = code(lambda: allow(rule(80, "10.0.0.0/99")))
    # instances
    run = ec2.run_instances(
        ImageId="ami-12345678", MinCount=1, MaxCount=1, SubnetId=subnets[0], PrivateIpAddress="10.0.0.20",
        SecurityGroupIds=[a], InstanceType="m5.large",
    )
    instance = run["Instances"][0]["InstanceId"]
    got = ec2.describe_instances(Filters=[{"Name": "private-dns-name", "Values": ["ip-10-0-0-20.us-west-2.compute.internal"]}])
    item = [i for r in got["Reservations"] for i in r["Instances"] if i["InstanceId"] == instance][0]
    out["instance"] = (item["State"]["Name"], item["PrivateIpAddress"], item["Placement"]["AvailabilityZone"])
    enis = ec2.describe_network_interfaces(
        Filters=[{"Name": "addresses.private-ip-address", "Values": ["10.0.0.20"]}, {"Name": "vpc-id", "Values": [vpc]}]
    )["NetworkInterfaces"]
    out["eni"] = [(e["PrivateIpAddress"], e["Attachment"]["InstanceId"] == instance, len(e["Groups"])) for e in enis]
    out["unknown instance"] = code(lambda: ec2.describe_instances(InstanceIds=["i-00000000000000000"]))
    out["unknown instance text"] = text(lambda: ec2.describe_instances(InstanceIds=["i-00000000000000000"]))
    # target groups
    make = lambda **k: elb.create_target_group(**{"Protocol": "HTTP", "Port": 80, "VpcId": vpc, **k})
    group = make(Name="web", TargetType="ip")["TargetGroups"][0]
    arn = group["TargetGroupArn"]
    out["group"] = {
        k: group.get(k) or None
        for k in ("Protocol", "Port", "TargetType", "HealthCheckProtocol", "HealthCheckPort", "HealthCheckPath",
                  "HealthCheckIntervalSeconds", "HealthCheckTimeoutSeconds", "HealthyThresholdCount", "UnhealthyThresholdCount", "Matcher",
                  "ProtocolVersion", "IpAddressType", "LoadBalancerArns")
    }
    out["group arn"] = re.sub(r"/[0-9a-f]{16}$", "/ID", arn)
    tcp = make(Name="tcp", Protocol="TCP", TargetType="ip")["TargetGroups"][0]
    out["tcp"] = (tcp["HealthCheckProtocol"], tcp.get("HealthCheckPath"), tcp["HealthCheckIntervalSeconds"])
    out["other settings"] = code(lambda: make(Name="web", TargetType="ip", Port=81))
    out["long name"] = text(lambda: make(Name="x" * 33))
    out["odd name"] = text(lambda: make(Name="a_b"))
    out["timeout"] = code(lambda: make(Name="t", HealthCheckIntervalSeconds=10, HealthCheckTimeoutSeconds=30))
    out["unknown group name"] = code(lambda: elb.describe_target_groups(Names=["nope"]))
    out["unknown group arn"] = code(
        lambda: elb.describe_target_groups(TargetGroupArns=[re.sub("[0-9a-f]{16}$", "0" * 16, arn)])
    )
    out["bad delay"] = text(
        lambda: elb.modify_target_group_attributes(
            TargetGroupArn=arn, Attributes=[{"Key": "deregistration_delay.timeout_seconds", "Value": "3601"}]
        )
    )
    elb.modify_target_group_attributes(
        TargetGroupArn=arn, Attributes=[{"Key": "deregistration_delay.timeout_seconds", "Value": "5"}]
    )
    attributes = {a["Key"]: a["Value"] for a in elb.describe_target_group_attributes(TargetGroupArn=arn)["Attributes"]}
    out["delay"] = attributes["deregistration_delay.timeout_seconds"]
    lb = elb.create_load_balancer(Name="lb", Subnets=subnets, SecurityGroups=[a], Scheme="internal")["LoadBalancers"][0]
    out["lb"] = (lb["Type"], lb["Scheme"], sorted(z["ZoneName"] for z in lb["AvailabilityZones"]), lb["SecurityGroups"] == [a])
    listener = elb.create_listener(
        LoadBalancerArn=lb["LoadBalancerArn"], Protocol="HTTP", Port=80,
        DefaultActions=[{"Type": "forward", "TargetGroupArn": arn}],
    )["Listeners"][0]
    out["listener"] = (listener["Port"], listener["Protocol"], listener["DefaultActions"][0]["Type"])
    twice = lambda group: code(
        lambda: elb.create_listener(
            LoadBalancerArn=lb["LoadBalancerArn"], Protocol="HTTP", Port=80,
            DefaultActions=[{"Type": "forward", "TargetGroupArn": group}],
        )
    )
    out["the same listener twice"] = twice(arn)
    out["another listener on the port"] = twice(make(Name="other", TargetType="ip")["TargetGroups"][0]["TargetGroupArn"])
    out["attached"] = len(elb.describe_target_groups(LoadBalancerArn=lb["LoadBalancerArn"])["TargetGroups"])
    out["in use"] = code(lambda: elb.delete_target_group(TargetGroupArn=arn))
    elb.register_targets(TargetGroupArn=arn, Targets=[{"Id": "10.0.0.5", "Port": 8080}, {"Id": "10.0.1.5", "Port": 8080}])
    health = elb.describe_target_health(TargetGroupArn=arn)["TargetHealthDescriptions"]
    out["targets"] = sorted((h["Target"]["Id"], h["Target"]["Port"]) for h in health)
    elb.add_tags(ResourceArns=[arn], Tags=[{"Key": "k", "Value": "v"}, {"Key": "l", "Value": ""}])
    elb.remove_tags(ResourceArns=[arn], TagKeys=["l"])
    out["tags"] = elb.describe_tags(ResourceArns=[arn])["TagDescriptions"][0]["Tags"]
    out["no listeners named"] = code(lambda: elb.describe_listeners())
    byinstance = make(Name="byinstance")["TargetGroups"][0]["TargetGroupArn"]
    ec2.stop_instances(InstanceIds=[instance])
    out["stopped instance"] = code(lambda: elb.register_targets(TargetGroupArn=byinstance, Targets=[{"Id": instance}]))
    out["zones"] = sorted(
        z["ZoneName"] for z in ec2.describe_availability_zones(Filters=[{"Name": "state", "Values": ["available"]}])["AvailabilityZones"]
    )
    elb.delete_listener(ListenerArn=listener["ListenerArn"])
    elb.delete_load_balancer(LoadBalancerArn=lb["LoadBalancerArn"])
    elb.delete_target_group(TargetGroupArn=arn)
    ec2.terminate_instances(InstanceIds=[instance])
    return out


# What differs between moto and awsim, and why awsim's answer is AWS's: docs/awsim.md, "Where moto says otherwise".
# name -> what moto answers instead.
DIFFERENT = {
    "unknown vpc text": "VpcID {'vpc-00000000000000000'} does not exist.",
    "authorized": [(82, None, "fd00::/64", False, None)],
    "delete referenced": "ok",
    "another listener on the port": "ok",
    "attached": 2,
}


def own(elb, ec2, sts, admin):
    """What only awsim can express."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16", AmazonProvidedIpv6CidrBlock=True)["Vpc"]["VpcId"]
    subnets = [
        ec2.create_subnet(VpcId=vpc, CidrBlock=f"10.0.{n}.0/24", AvailabilityZone=REGION + z)["Subnet"]["SubnetId"]
        for n, z in enumerate("ab")
    ]
    make = lambda **k: elb.create_target_group(**{"Protocol": "HTTP", "Port": 80, "VpcId": vpc, **k})["TargetGroups"][0]["TargetGroupArn"]
    arn = make(Name="web", TargetType="ip")
    register = lambda arn=arn, **t: elb.register_targets(TargetGroupArn=arn, Targets=[t])
    check("an address outside the VPC needs a zone", text(lambda: register(Id="10.4.40.87"))
          == "The Availability Zone is required for IP address '10.4.40.87' because it is not in the VPC")
    check("an address of a subnet refuses 'all'", "is within the VPC" in text(lambda: register(Id="10.0.0.9", AvailabilityZone="all")))
    check("another account's group is a ValidationError", code(lambda: register(arn=arn.replace("111122223333", "444455556666"), Id="10.0.0.9")) == "ValidationError")
    check("an unknown target deregisters", code(lambda: elb.deregister_targets(TargetGroupArn=arn, Targets=[{"Id": "10.0.0.77"}])) == "ok")
    register(Id="10.0.0.9", Port=1), register(Id="10.0.0.9", Port=2)
    states = lambda: sorted((h["Target"]["Port"], h["TargetHealth"]["State"], h["TargetHealth"].get("Reason"), h["Target"].get("AvailabilityZone"), h["HealthCheckPort"])
                            for h in elb.describe_target_health(TargetGroupArn=arn)["TargetHealthDescriptions"])
    check("one address with two ports is two unused targets", states() == [
        (1, "unused", "Target.NotInUse", "us-west-2a", "1"), (2, "unused", "Target.NotInUse", "us-west-2a", "2")], states())
    lb = elb.create_load_balancer(Name="lb", Subnets=subnets)["LoadBalancers"][0]["LoadBalancerArn"]
    listener = elb.create_listener(LoadBalancerArn=lb, Protocol="HTTP", Port=80, DefaultActions=[{"Type": "forward", "TargetGroupArn": arn}])["Listeners"][0]
    admin("POST", "clock", {"scale": 0})
    register(Id="10.0.0.9", Port=3)
    check("a new target is initial", (3, "initial", "Elb.RegistrationInProgress", "us-west-2a", "3") in states(), states())
    admin("POST", "clock", {"advance_ms": 60000})
    check("then healthy", [s[1] for s in states()] == ["healthy"] * 3, states())
    elb.deregister_targets(TargetGroupArn=arn, Targets=[{"Id": "10.0.0.9", "Port": 3}])
    check("then draining", (3, "draining", "Target.DeregistrationInProgress", "us-west-2a", "3") in states(), states())
    admin("POST", "clock", {"advance_ms": 300000})
    check("then gone", len(states()) == 2, states())
    register(Id="10.0.0.10"), admin("POST", "clock", {"advance_ms": 60000})
    admin("POST", "seed", {"account": "111122223333", "shifted_zones": ["us-west-2a"]})
    told = elb.describe_target_health(TargetGroupArn=arn, Include=["AnomalyDetection"])["TargetHealthDescriptions"]
    check("anomalies and overrides", {(h["AnomalyDetection"]["Result"], h["AdministrativeOverride"]["State"]) for h in told} == {("normal", "zonal_shift_active")}, told)
    admin("POST", "seed", {"account": "111122223333", "shifted_zones": []})
    elb.set_subnets(LoadBalancerArn=lb, Subnets=subnets), elb.set_security_groups(LoadBalancerArn=lb, SecurityGroups=[ec2.create_security_group(GroupName="lb", Description="lb", VpcId=vpc)["GroupId"]])
    other = make(Name="other", TargetType="ip")
    point = lambda to: elb.modify_listener(ListenerArn=listener["ListenerArn"], DefaultActions=[{"Type": "forward", "TargetGroupArn": to}])
    point(other), point(arn)
    made = elb.create_rule(ListenerArn=listener["ListenerArn"], Priority=5, Actions=[{"Type": "forward", "TargetGroupArn": other}], Tags=[{"Key": "k", "Value": "v"}],
                           Conditions=[{"Field": "host-header", "HostHeaderConfig": {"Values": ["a.example", "b.example"]}}, {"Field": "query-string", "QueryStringConfig": {"Values": [{"Key": "k", "Value": "v"}]}}])["Rules"][0]
    check("conditions of a rule", made["Conditions"][0]["HostHeaderConfig"]["Values"] == ["a.example", "b.example"], made)
    check("tags of a rule", elb.describe_tags(ResourceArns=[made["RuleArn"]])["TagDescriptions"][0]["Tags"] == [{"Key": "k", "Value": "v"}])
    elb.modify_rule(RuleArn=made["RuleArn"], Conditions=[{"Field": "path-pattern", "Values": ["/x"]}])
    check("a group of a rule is in use", code(lambda: elb.delete_target_group(TargetGroupArn=other)) == "ResourceInUse")
    elb.delete_rule(RuleArn=made["RuleArn"]), elb.delete_target_group(TargetGroupArn=other)
    admin("POST", "clock", {"scale": 1})
    check("rules of a listener", elb.describe_rules(ListenerArn=listener["ListenerArn"])["Rules"][0]["IsDefault"])
    elb.describe_load_balancer_attributes(LoadBalancerArn=lb)
    elb.modify_load_balancer_attributes(LoadBalancerArn=lb, Attributes=[{"Key": "idle_timeout.timeout_seconds", "Value": "30"}])
    elb.describe_load_balancers(), elb.describe_listeners(LoadBalancerArn=lb)
    elb.modify_target_group(TargetGroupArn=arn, HealthCheckIntervalSeconds=40)
    for p, k in [("TLS", "ip"), ("UDP", "ip"), ("GENEVE", "ip"), ("TCP_QUIC", "ip"), ("TCP", "alb"), ("TCP", "instance")]:
        make(Name=f"{p}-{k}".replace("_", "-"), Protocol=p, TargetType=k, Port=6081 if p == "GENEVE" else 443)
    elb.create_target_group(Name="fn", TargetType="lambda"), make(Name="grpc", ProtocolVersion="GRPC")
    quic = elb.describe_target_groups(Names=["TCP-QUIC-ip"])["TargetGroups"][0]["TargetGroupArn"]
    check("QUIC needs a server id", code(lambda: register(arn=quic, Id="10.0.0.9")) == "ValidationError")
    register(arn=quic, Id="10.0.0.9", QuicServerId="0x00000000000000aa")
    pages = elb.get_paginator("describe_target_groups").paginate(PaginationConfig={"PageSize": 2})
    check("groups come in pages", sum(len(p["TargetGroups"]) for p in pages) == 9)
    eni = ec2.create_network_interface(SubnetId=subnets[0], Ipv4Prefixes=[{"Ipv4Prefix": "10.0.0.64/28"}])["NetworkInterface"]["NetworkInterfaceId"]
    ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, Ipv4Prefixes=["10.0.0.96/28"])
    ec2.assign_private_ip_addresses(NetworkInterfaceId=eni, PrivateIpAddresses=["10.0.0.50"])
    ec2.assign_ipv6_addresses(NetworkInterfaceId=eni, Ipv6Addresses=["2600:1f14:abc::5"])
    e = ec2.describe_network_interfaces(NetworkInterfaceIds=[eni])["NetworkInterfaces"][0]
    check("interfaces have prefixes", [p["Ipv4Prefix"] for p in e["Ipv4Prefixes"]] == ["10.0.0.64/28", "10.0.0.96/28"], e)
    ec2.delete_network_interface(NetworkInterfaceId=eni)
    g = ec2.create_security_group(GroupName="a", Description="a", VpcId=vpc)["GroupId"]
    allow = lambda *r: ec2.authorize_security_group_ingress(GroupId=g, IpPermissions=list(r))
    made = allow(rule(80, "100.68.0.18/18", description="one"))["SecurityGroupRules"][0]
    check("blocks are canonical", made["CidrIpv4"] == "100.68.0.0/18", made)
    check("another description is a duplicate", code(lambda: allow(rule(80, "100.68.0.0/18", description="two"))) == "InvalidPermission.Duplicate")
    check("revoking with another description fails", code(lambda: ec2.revoke_security_group_ingress(GroupId=g, IpPermissions=[rule(80, "100.68.0.0/18", description="two")])) == "InvalidPermission.NotFound")
    ec2.modify_security_group_rules(GroupId=g, SecurityGroupRules=[{"SecurityGroupRuleId": made["SecurityGroupRuleId"], "SecurityGroupRule": {"IpProtocol": "tcp", "FromPort": 80, "ToPort": 90, "CidrIpv4": "100.68.0.0/18", "Description": "m"}}])
    r = ec2.describe_security_group_rules(SecurityGroupRuleIds=[made["SecurityGroupRuleId"]])["SecurityGroupRules"][0]
    check("rules can be changed", (r["ToPort"], r["Description"]) == (90, "m"), r)
    allow(*[rule(1000 + n, "10.0.0.0/8") for n in range(59)])
    check("60 rules are the most", code(lambda: allow(rule(1, "10.0.0.0/8"))) == "RulesPerSecurityGroupLimitExceeded")
    check("and 60 of IPv6", code(lambda: allow(rule(1, "fd00::/8"))) == "ok")
    pages = list(ec2.get_paginator("describe_security_group_rules").paginate(Filters=[{"Name": "group-id", "Values": [g]}], PaginationConfig={"PageSize": 20}))
    check("rules come in pages", [len(p["SecurityGroupRules"]) for p in pages] == [20, 20, 20, 2], [len(p["SecurityGroupRules"]) for p in pages])
    revoked = ec2.revoke_security_group_ingress(GroupId=g, SecurityGroupRuleIds=[made["SecurityGroupRuleId"]])
    check("revoking tells the rules", len(revoked["RevokedSecurityGroupRules"]) == 1, revoked)
    ec2.create_tags(Resources=[g, vpc], Tags=[{"Key": "kubernetes.io/cluster/x", "Value": "owned"}])
    check("tags filter", len(ec2.describe_security_groups(Filters=[{"Name": "tag:kubernetes.io/cluster/x", "Values": ["owned"]}])["SecurityGroups"]) == 1)
    ec2.describe_tags(Filters=[{"Name": "resource-id", "Values": [g]}]), ec2.delete_tags(Resources=[vpc], Tags=[{"Key": "kubernetes.io/cluster/x"}])
    many = [{"Name": "addresses.private-ip-address", "Values": [f"10.0.0.{n}" for n in range(201)]}]
    check("200 filter values are the most", code(lambda: ec2.describe_network_interfaces(Filters=many)) == "FilterLimitExceeded")
    ec2.describe_regions(), ec2.describe_availability_zones()
    admin("POST", "roles", {"arn": "arn:aws:iam::999988887777:role/team/r", "trusts": ["111122223333"], "external_id": "ext"})
    assume = lambda **k: sts.assume_role(**{"RoleArn": "arn:aws:iam::999988887777:role/team/r", "RoleSessionName": "ss", **k})
    check("a missing external id is denied", code(assume) == "AccessDenied")
    got = assume(ExternalId="ext")
    check("a role drops its path", got["AssumedRoleUser"]["Arn"] == "arn:aws:sts::999988887777:assumed-role/r/ss", got)
    c = got["Credentials"]
    other = boto3.client("sts", endpoint_url=sts.meta.endpoint_url, region_name=REGION, aws_access_key_id=c["AccessKeyId"], aws_secret_access_key=c["SecretAccessKey"], aws_session_token=c["SessionToken"])
    check("its keys are the role's account", other.get_caller_identity()["Account"] == "999988887777")
    admin("POST", "faults", {"account": "111122223333", "action": "DescribeTags", "count": 1, "effect": {"kind": "throttle"}})
    check("ELBv2 throttles with 400 Throttling", code(lambda: elb.describe_tags(ResourceArns=[arn])) == "Throttling")
    admin("POST", "faults", {"account": "111122223333", "service": "ec2", "count": 1, "effect": {"kind": "deny"}})
    check("EC2 denies with UnauthorizedOperation", code(ec2.describe_vpcs) == "UnauthorizedOperation")
    for kind in ("reset", "lost_response"):
        admin("POST", "faults", {"account": "111122223333", "action": "AddTags", "count": 1, "effect": {"kind": kind}})
        try:
            elb.add_tags(ResourceArns=[arn], Tags=[{"Key": kind, "Value": "v"}])
            check(f"{kind} has no answer", False, "an answer")
        except ClientError as e:
            check(f"{kind} has no answer", False, e)
        except Exception as e:
            check(f"{kind} has no answer: {type(e).__name__}", True)
    keys = [t["Key"] for t in elb.describe_tags(ResourceArns=[arn])["TagDescriptions"][0]["Tags"]]
    check("a lost response is a change that was made, a reset isn't", keys == ["lost_response"], keys)


class Requests:
    """Compares requests with the model of their action."""

    def __init__(self):
        self.problems, self.seen = set(), set()
        session = botocore.session.get_session()
        names = {"elb": "elbv2", "ec2": "ec2", "sts": "sts"}
        self.models = {n: session.get_service_model(m) for n, m in names.items()}

    def check(self, service, action, parameters, succeeded):
        self.model, self.strict = self.models[service], succeeded
        self.seen.add((service, action))
        tree = {}
        for name, value in parameters.items():
            node = tree
            for part in name.split("."):
                node = node.setdefault(part, {})
            node[""] = value
        shape = self.model.operation_model(action).input_shape
        if shape:
            self.structure(action, shape, tree)
        elif tree:
            self.problems.add(f"{action}: has parameters, the model has none")

    def wire(self, name, member):
        s = member.serialization
        own = s.get("name", name)
        return s.get("queryName") or (own[:1].upper() + own[1:] if self.model.protocol == "ec2" else own)

    def structure(self, where, shape, tree):
        members = {self.wire(n, m): m for n, m in shape.members.items()}
        for name, node in tree.items():
            if name in members:
                self.value(f"{where}.{name}", members[name], node)
            elif name:
                self.problems.add(f"{where}: unknown {name}")
        for name in shape.required_members:
            if self.strict and self.wire(name, shape.members[name]) not in tree:
                self.problems.add(f"{where}: no {name}, which is required")

    def value(self, where, shape, node):
        if shape.type_name == "structure":
            return self.structure(where, shape, node)
        if shape.type_name == "list":
            if self.model.protocol != "ec2" and not shape.serialization.get("flattened"):
                if node == {"": ""}:
                    return
                name = shape.member.serialization.get("name", "member")
                if set(node) != {name}:
                    self.problems.add(f"{where}: {sorted(node)} in place of {name}")
                node = node.get(name, {})
            if sorted(node) != sorted(str(n + 1) for n in range(len(node))):
                self.problems.add(f"{where}: not numbered from 1 on")
            for item in node.values():
                self.value(f"{where}.N", shape.member, item)
            return
        if set(node) != {""}:
            self.problems.add(f"{where}: parameters in a text")
        text, limits = node.get("", ""), shape.metadata
        if not self.strict:
            return
        if shape.type_name in ("integer", "long"):
            fine = re.fullmatch(r"-?\d+", text) and limits.get("min", -2**63) <= int(text) <= limits.get("max", 2**63)
        elif shape.type_name == "boolean":
            fine = text in ("true", "false")
        elif shape.type_name == "string":
            fine = (not shape.enum or text in shape.enum) and limits.get("min", 0) <= len(text) <= limits.get("max", 2**31)
        else:
            fine = True
        if not fine:
            self.problems.add(f"{where}: '{text}' is not what the model allows")


class Recorded:
    """An answer of a recording, as botocore hands it over."""

    def __init__(self, line):
        self.content, self.status_code = line["answer"].encode(), line["status"]
        self.headers = {"x-amzn-requestid": "not recorded"}


def replay(files):
    witness, requests, count = Witness(), Requests(), 0
    for file in files:
        for line in map(json.loads, open(file, encoding="utf-8")):
            count += 1
            model = requests.models[line["service"]]
            if line["action"] not in model.operation_names:
                check(f"{file}: {line['action']} is an action", False)
                continue
            form = dict(urllib.parse.parse_qsl(line["request"], keep_blank_values=True))
            parameters = {k: v for k, v in form.items() if k not in ("Action", "Version")}
            requests.check(line["service"], line["action"], parameters, line["status"] < 300)
            witness.answer(model, model.operation_model(line["action"]), Recorded(line))
    what = f"{count} recorded requests and answers of {len(requests.seen)} actions are as botocore's model has them"
    problems = sorted(witness.problems | requests.problems)
    check(what, count and not problems, "\n      " + "\n      ".join(problems))
    sys.exit(1 if FAILED else 0)


def command_line(endpoint):
    aws = os.path.join(os.path.dirname(sys.executable), "aws")
    env = {**os.environ, "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "555566667777", "AWS_SECRET_ACCESS_KEY": "x",
           "AWS_DEFAULT_REGION": REGION, "AWS_PAGER": "", "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null"}

    def run(line):
        done = subprocess.run([aws, *line.split(), "--output", "json"], env=env, capture_output=True, text=True, timeout=60)
        if done.returncode:
            check(f"aws {line}", False, done.stderr.strip())
            return {}
        check("aws " + line.split(" --")[0], True)
        return json.loads(done.stdout) if done.stdout.strip() else {}

    check("account of the key", run("sts get-caller-identity").get("Account") == "555566667777")
    vpc = run("ec2 create-vpc --cidr-block 10.0.0.0/16")["Vpc"]["VpcId"]
    subnets = [run(f"ec2 create-subnet --vpc-id {vpc} --cidr-block 10.0.{n}.0/24 --availability-zone {REGION}{z}")["Subnet"]["SubnetId"] for n, z in enumerate("ab")]
    arn = run(f"elbv2 create-target-group --name w --protocol HTTP --port 80 --vpc-id {vpc} --target-type ip")["TargetGroups"][0]["TargetGroupArn"]
    lb = run(f"elbv2 create-load-balancer --name w --subnets {' '.join(subnets)}")["LoadBalancers"][0]["LoadBalancerArn"]
    run(f"elbv2 create-listener --load-balancer-arn {lb} --protocol HTTP --port 80 --default-actions Type=forward,TargetGroupArn={arn}")
    run(f"elbv2 register-targets --target-group-arn {arn} --targets Id=10.0.0.5,Port=8080")
    got = run(f"elbv2 describe-target-health --target-group-arn {arn}")["TargetHealthDescriptions"]
    check("one target on the command line", got[0]["Target"] == {"Id": "10.0.0.5", "Port": 8080, "AvailabilityZone": "us-west-2a"}, got)
    run(f"elbv2 deregister-targets --target-group-arn {arn} --targets Id=10.0.0.5,Port=8080")
    run("elbv2 describe-target-groups"), run("ec2 describe-instances"), run("ec2 describe-security-groups"), run("ec2 describe-network-interfaces")


def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def main():
    if sys.argv[1] == "--replay":
        replay(sys.argv[2:])
    started = []
    try:
        sim = subprocess.Popen([sys.argv[1], "--port", "0", "--end-with-stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(sim)
        endpoint = sim.stdout.readline().split()[-1]
        at = port()
        moto = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "moto_server"), "-H", "127.0.0.1", "-p", str(at)],
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started.append(moto)

        def admin(method, path, body=None):
            data = json.dumps(body).encode() if body is not None else None
            with urllib.request.urlopen(urllib.request.Request(f"{endpoint}/_awsim/{path}", data=data, method=method)) as r:
                return json.loads(r.read())

        witness = Witness()
        own(*clients(endpoint, "111122223333", witness), admin)
        ours = scenario(*clients(endpoint, "AKIAIOSFODNN7EXAMPLE", witness))
        command_line(endpoint)
        check(f"the answers of {len(witness.seen)} actions are as botocore's model has them", not witness.problems, "\n      " + "\n      ".join(sorted(witness.problems)))
        requests = Requests()
        for call in admin("GET", "journal"):
            requests.check(call["service"], call["action"], call["parameters"], call["status"] == 200)
        check("the requests are as botocore's model has them", not requests.problems, sorted(requests.problems))
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", at), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        theirs = scenario(*clients(f"http://127.0.0.1:{at}", "AKIAIOSFODNN7EXAMPLE"))
        for name, value in ours.items():
            if name in DIFFERENT:
                check(f"known difference: {name}", value != theirs[name] and theirs[name] == DIFFERENT[name], (value, theirs[name]))
            else:
                check(f"same on moto: {name}", value == theirs[name], f"awsim {value}, moto {theirs[name]}")
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()
    print(f"{len(FAILED)} failed")
    sys.exit(1 if FAILED else 0)


main()
