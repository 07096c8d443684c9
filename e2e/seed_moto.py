"""Puts a VPC with two nodes into moto at AWS_ENDPOINT_URL and prints what it made, as `Lab` in src/aws.rs."""
import json

import boto3

CLUSTER = "kubernetes.io/cluster/demo"
ec2 = boto3.client("ec2")


def tags(kind, **values):
    return [{"ResourceType": kind, "Tags": [{"Key": k, "Value": v} for k, v in values.items()]}]


vpc = ec2.create_vpc(CidrBlock="192.168.0.0/16")["Vpc"]["VpcId"]
ec2.associate_vpc_cidr_block(VpcId=vpc, CidrBlock="10.244.0.0/16")
zones = [z["ZoneName"] for z in ec2.describe_availability_zones()["AvailabilityZones"][:2]]
subnets = [
    ec2.create_subnet(VpcId=vpc, CidrBlock=f"192.168.{32 * n}.0/19", AvailabilityZone=zone)["Subnet"]["SubnetId"]
    for n, zone in enumerate(zones)
]
ec2.create_subnet(VpcId=vpc, CidrBlock="10.244.0.0/16", AvailabilityZone=zones[0])


def group(name, **labels):
    return ec2.create_security_group(
        GroupName=name, Description=name, VpcId=vpc, TagSpecifications=tags("security-group", Name=name, **labels)
    )["GroupId"]


nodes = group("nodes", **{CLUSTER: "owned"})
balancer = group("load-balancer")
instances = []
for n, (subnet, zone) in enumerate(zip(subnets, zones)):
    address = f"192.168.{32 * n}.10"
    made = ec2.run_instances(
        ImageId="ami-12c6146b", MinCount=1, MaxCount=1, SubnetId=subnet, SecurityGroupIds=[nodes],
        PrivateIpAddress=address, TagSpecifications=tags("instance", Name=f"node-{n + 1}", **{CLUSTER: "owned"}),
    )["Instances"][0]
    instances.append([made["InstanceId"], zone, made["PrivateIpAddress"]])
print(json.dumps({"vpc": vpc, "subnets": subnets, "node_group": nodes, "lb_group": balancer, "instances": instances}))
