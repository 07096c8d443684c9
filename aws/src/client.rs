//! The adapter: one method per call that tgb makes, from values to values.

use crate::error::AwsError;
use crate::limits::{Bucket, CallClass, Limits};
use crate::values::*;
use aws_sdk_ec2::types as ec2;
use aws_sdk_elasticloadbalancingv2::types as elb;
use aws_smithy_runtime_api::client::result::SdkError;
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;
use tgb_api::arn::TargetGroupArn;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::Role;
use tokio::sync::{Mutex, OnceCell};

/// Everything that has to be known to speak to AWS; what is absent is found as AWS's SDKs find it (environment,
/// profile, IRSA, Pod Identity, instance metadata).
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The region.
    pub region: Option<String>,
    /// The cluster's VPC.
    pub vpc_id: Option<String>,
    /// Names the sessions of assumed roles.
    pub cluster_name: String,
    /// Our own budget of calls.
    pub limits: Limits,
}

/// Who we are at AWS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Twelve digits.
    pub account: String,
    /// `aws`, `aws-cn`, …
    pub partition: String,
    /// `eu-west-1`, …
    pub region: String,
}

/// Which target groups to describe. One that does not exist fails the whole call, so never ask for strangers
/// together.
#[derive(Debug, Clone, Copy)]
pub enum TargetGroupQuery<'a> {
    /// One, by its ARN.
    Arn(&'a str),
    /// One, by its name.
    Name(&'a str),
    /// Several, by ARN.
    Arns(&'a [String]),
}

/// A handle on AWS; clones share connections, credentials and budget.
#[derive(Clone)]
pub struct Aws(Arc<Inner>);

struct Inner {
    config: aws_config::SdkConfig,
    own: aws_sdk_elasticloadbalancingv2::Client,
    ec2: aws_sdk_ec2::Client,
    identity: OnceCell<Identity>,
    region: String,
    vpc_id: Option<String>,
    cluster_name: String,
    /// Clients with assumed roles, by (role, external id). The lock is held only to find the cell of a role.
    assumed: Mutex<HashMap<(String, Option<String>), RoleClient>>,
    elb_describe: Bucket,
    elb_targets: Bucket,
    ec2_describe: Bucket,
    ec2_change: Bucket,
}

impl std::fmt::Debug for Aws {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Aws").field("region", &self.0.region).finish_non_exhaustive()
    }
}

/// A client that is made once, by whoever needs it first.
type RoleClient = Arc<OnceCell<aws_sdk_elasticloadbalancingv2::Client>>;

type Answer<T> = Result<T, AwsError>;

/// Most calls go out as they are; the SDK repeats what failed in transit at most this often.
const ATTEMPTS: u32 = 3;
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(8);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// EC2 takes at most 200 filter values in one request; one more is the VPC's.
const FILTER_VALUES: usize = 199;
/// EC2 takes at most 1,000 ids in one request.
const IDS: usize = 1000;

impl Aws {
    /// Finds region and credentials. Makes no call to a service.
    ///
    /// # Errors
    /// `NoRegion`, with what to do about it.
    pub async fn connect(settings: Settings) -> Answer<Self> {
        let mut loader = aws_config::defaults(aws_config::BehaviorVersion::latest())
            .retry_config(aws_config::retry::RetryConfig::standard().with_max_attempts(ATTEMPTS))
            .timeout_config(
                aws_config::timeout::TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .build(),
            );
        if let Some(region) = settings.region.clone() {
            loader = loader.region(aws_config::Region::new(region));
        }
        let config = loader.load().await;
        let region = config.region().map(ToString::to_string).ok_or_else(|| AwsError {
            operation: "Connect",
            code: "NoRegion".to_owned(),
            message: "no AWS region is known; give --aws-region or set AWS_REGION".to_owned(),
        })?;
        let limits = settings.limits;
        Ok(Self(Arc::new(Inner {
            own: aws_sdk_elasticloadbalancingv2::Client::new(&config),
            ec2: aws_sdk_ec2::Client::new(&config),
            config,
            identity: OnceCell::new(),
            region,
            vpc_id: settings.vpc_id.filter(|id| !id.is_empty()),
            cluster_name: settings.cluster_name,
            assumed: Mutex::default(),
            elb_describe: Bucket::new(limits.elb_describe),
            elb_targets: Bucket::new(limits.elb_targets),
            ec2_describe: Bucket::new(limits.ec2_describe),
            ec2_change: Bucket::new(limits.ec2_change),
        })))
    }

    /// The region that calls go to.
    pub fn region(&self) -> &str {
        &self.0.region
    }

    /// The cluster's VPC, if it was given.
    pub fn vpc_id(&self) -> Option<&str> {
        self.0.vpc_id.as_deref()
    }

    /// Who we are (GetCallerIdentity, once; it needs no permission).
    ///
    /// # Errors
    /// What STS answered; `NoCredentials` where there are none.
    pub async fn identity(&self) -> Answer<&Identity> {
        self.0
            .identity
            .get_or_try_init(|| async {
                let sts = aws_sdk_sts::Client::new(&self.0.config);
                let answer =
                    sts.get_caller_identity().send().await.map_err(|e| failed("GetCallerIdentity", &e))?;
                let arn = answer.arn().unwrap_or_default();
                Ok(Identity {
                    account: answer.account().unwrap_or_default().to_owned(),
                    partition: arn.split(':').nth(1).unwrap_or("aws").to_owned(),
                    region: self.0.region.clone(),
                })
            })
            .await
    }

    // ---- Elastic Load Balancing v2 ----

    /// DescribeTargetGroups.
    ///
    /// # Errors
    /// What AWS answered; `TargetGroupNotFound` if any of them does not exist.
    pub async fn target_groups(
        &self,
        role: Option<Role<'_>>,
        query: TargetGroupQuery<'_>,
    ) -> Answer<Vec<TargetGroup>> {
        const OPERATION: &str = "DescribeTargetGroups";
        let client = self.elb(role).await?;
        let mut found = Vec::new();
        let mut marker = None;
        loop {
            self.0.elb_describe.take().await;
            let call = client.describe_target_groups().set_marker(marker);
            let call = match query {
                TargetGroupQuery::Arn(arn) => call.target_group_arns(arn),
                TargetGroupQuery::Name(name) => call.names(name),
                TargetGroupQuery::Arns(arns) => call.set_target_group_arns(Some(arns.to_vec())),
            };
            let answer =
                self.seen(CallClass::ElbDescribe, call.send().await.map_err(|e| failed(OPERATION, &e)))?;
            found.extend(answer.target_groups().iter().filter_map(target_group));
            marker = answer.next_marker;
            if marker.is_none() {
                return Ok(found);
            }
        }
    }

    /// DescribeTags of one target group.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn tags(&self, role: Option<Role<'_>>, arn: &str) -> Answer<BTreeMap<String, String>> {
        let client = self.elb(role).await?;
        self.0.elb_describe.take().await;
        let answer = client.describe_tags().resource_arns(arn).send().await;
        let answer = self.seen(CallClass::ElbDescribe, answer.map_err(|e| failed("DescribeTags", &e)))?;
        let tags = answer.tag_descriptions().iter().flat_map(|description| description.tags());
        Ok(tags
            .filter_map(|t| Some((t.key()?.to_owned(), t.value().unwrap_or_default().to_owned())))
            .collect())
    }

    /// DescribeTargetGroupAttributes.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn target_group_attributes(
        &self,
        role: Option<Role<'_>>,
        arn: &str,
    ) -> Answer<BTreeMap<String, String>> {
        let client = self.elb(role).await?;
        self.0.elb_describe.take().await;
        let answer = client.describe_target_group_attributes().target_group_arn(arn).send().await;
        let answer = self
            .seen(CallClass::ElbDescribe, answer.map_err(|e| failed("DescribeTargetGroupAttributes", &e)))?;
        let attributes = answer.attributes().iter();
        Ok(attributes.filter_map(|a| Some((a.key()?.to_owned(), a.value()?.to_owned()))).collect())
    }

    /// DescribeTargetHealth of everything that is registered.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn target_health(&self, role: Option<Role<'_>>, arn: &str) -> Answer<Vec<ObservedTarget>> {
        let client = self.elb(role).await?;
        self.0.elb_describe.take().await;
        let answer = client.describe_target_health().target_group_arn(arn).send().await;
        let answer =
            self.seen(CallClass::ElbDescribe, answer.map_err(|e| failed("DescribeTargetHealth", &e)))?;
        Ok(answer.target_health_descriptions().iter().filter_map(observed_target).collect())
    }

    /// RegisterTargets, one call; the caller keeps to at most 200 targets.
    ///
    /// # Errors
    /// What AWS answered. One bad target fails the whole call.
    pub async fn register(&self, role: Option<Role<'_>>, arn: &str, targets: &[Target]) -> Answer<()> {
        let client = self.elb(role).await?;
        self.0.elb_targets.take().await;
        let targets = Some(targets.iter().map(description).collect());
        let answer = client.register_targets().target_group_arn(arn).set_targets(targets).send().await;
        self.seen(CallClass::ElbTargets, answer.map_err(|e| failed("RegisterTargets", &e))).map(drop)
    }

    /// DeregisterTargets, one call; the caller keeps to at most 200 targets. An unknown target is no error to AWS.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn deregister(&self, role: Option<Role<'_>>, arn: &str, targets: &[Target]) -> Answer<()> {
        let client = self.elb(role).await?;
        self.0.elb_targets.take().await;
        let targets = Some(targets.iter().map(description).collect());
        let answer = client.deregister_targets().target_group_arn(arn).set_targets(targets).send().await;
        self.seen(CallClass::ElbTargets, answer.map_err(|e| failed("DeregisterTargets", &e))).map(drop)
    }

    // ---- EC2, always with the cluster's own identity ----

    /// DescribeVpcs of one VPC.
    ///
    /// # Errors
    /// What AWS answered; `InvalidVpcID.NotFound` for another account's.
    pub async fn vpc(&self, id: &str) -> Answer<Vpc> {
        self.0.ec2_describe.take().await;
        let answer = self.0.ec2.describe_vpcs().vpc_ids(id).send().await;
        let answer = self.seen(CallClass::Ec2Describe, answer.map_err(|e| failed("DescribeVpcs", &e)))?;
        let mut cidrs = Vec::new();
        for vpc in answer.vpcs() {
            for block in vpc.cidr_block_association_set() {
                let state = block.cidr_block_state().and_then(|state| state.state());
                if matches!(state, Some(ec2::VpcCidrBlockStateCode::Associated)) {
                    cidrs.extend(block.cidr_block().map(str::to_owned));
                }
            }
            for block in vpc.ipv6_cidr_block_association_set() {
                let state = block.ipv6_cidr_block_state().and_then(|state| state.state());
                if matches!(state, Some(ec2::VpcCidrBlockStateCode::Associated)) {
                    cidrs.extend(block.ipv6_cidr_block().map(str::to_owned));
                }
            }
        }
        Ok(Vpc { id: id.to_owned(), cidrs })
    }

    /// DescribeSubnets of a VPC. For AWS, "inside the VPC" means inside one of these.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn subnets(&self, vpc_id: &str) -> Answer<Vec<Subnet>> {
        let mut found = Vec::new();
        let mut token = None;
        loop {
            self.0.ec2_describe.take().await;
            let call = self.0.ec2.describe_subnets().filters(filter("vpc-id", vec![vpc_id.to_owned()]));
            let answer = call.max_results(1000).set_next_token(token).send().await;
            let answer =
                self.seen(CallClass::Ec2Describe, answer.map_err(|e| failed("DescribeSubnets", &e)))?;
            found.extend(answer.subnets().iter().map(|subnet| {
                Subnet {
                    id: subnet.subnet_id().unwrap_or_default().to_owned(),
                    zone: subnet.availability_zone().unwrap_or_default().to_owned(),
                    cidrs: subnet
                        .cidr_block()
                        .into_iter()
                        .chain(
                            subnet
                                .ipv6_cidr_block_association_set()
                                .iter()
                                .filter_map(|b| b.ipv6_cidr_block()),
                        )
                        .map(str::to_owned)
                        .collect(),
                }
            }));
            token = answer.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(found);
            }
        }
    }

    /// DescribeInstances: the network interfaces of instances. Instances that do not exist are simply missing.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn interfaces_of_instances(&self, instance_ids: &[String]) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        // By filter and not by id: one unknown id would fail the whole call.
        for ids in instance_ids.chunks(FILTER_VALUES) {
            let mut token = None;
            loop {
                self.0.ec2_describe.take().await;
                let call = self.0.ec2.describe_instances().filters(filter("instance-id", ids.to_vec()));
                let answer = call.max_results(1000).set_next_token(token).send().await;
                let answer =
                    self.seen(CallClass::Ec2Describe, answer.map_err(|e| failed("DescribeInstances", &e)))?;
                for instance in answer.reservations().iter().flat_map(|r| r.instances()) {
                    found.extend(
                        instance.network_interfaces().iter().map(|eni| instance_interface(instance, eni)),
                    );
                }
                token = answer.next_token.filter(|token| !token.is_empty());
                if token.is_none() {
                    break;
                }
            }
        }
        Ok(found)
    }

    /// DescribeNetworkInterfaces by id (pods with an interface of their own).
    ///
    /// # Errors
    /// What AWS answered; `InvalidNetworkInterfaceID.NotFound` if any does not exist.
    pub async fn interfaces(&self, ids: &[String]) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        for ids in ids.chunks(IDS) {
            self.0.ec2_describe.take().await;
            let call = self.0.ec2.describe_network_interfaces().set_network_interface_ids(Some(ids.to_vec()));
            let answer = call.send().await.map_err(|e| failed("DescribeNetworkInterfaces", &e));
            let answer = self.seen(CallClass::Ec2Describe, answer)?;
            found.extend(answer.network_interfaces().iter().map(interface));
        }
        Ok(found)
    }

    /// DescribeNetworkInterfaces by private address (Fargate). Addresses in delegated prefixes are not found so.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn interfaces_by_address(
        &self,
        vpc_id: &str,
        addresses: &[IpAddr],
    ) -> Answer<Vec<NetworkInterface>> {
        let mut found = Vec::new();
        let (v4, v6): (Vec<&IpAddr>, Vec<&IpAddr>) = addresses.iter().partition(|address| address.is_ipv4());
        for (name, addresses) in [("addresses.private-ip-address", v4), ("ipv6-addresses.ipv6-address", v6)] {
            for chunk in addresses.chunks(FILTER_VALUES) {
                let mut token = None;
                loop {
                    self.0.ec2_describe.take().await;
                    let values = chunk.iter().map(ToString::to_string).collect();
                    let call = self.0.ec2.describe_network_interfaces().filters(filter(name, values));
                    let call = call.filters(filter("vpc-id", vec![vpc_id.to_owned()]));
                    let answer = call.max_results(1000).set_next_token(token).send().await;
                    let answer = answer.map_err(|e| failed("DescribeNetworkInterfaces", &e));
                    let answer = self.seen(CallClass::Ec2Describe, answer)?;
                    found.extend(answer.network_interfaces().iter().map(interface));
                    token = answer.next_token.filter(|token| !token.is_empty());
                    if token.is_none() {
                        break;
                    }
                }
            }
        }
        Ok(found)
    }

    /// DescribeSecurityGroups by id; those that do not exist are simply missing.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn security_groups(&self, ids: &[String]) -> Answer<Vec<SecurityGroup>> {
        let mut found = Vec::new();
        for ids in ids.chunks(FILTER_VALUES) {
            found.extend(self.describe_security_groups(vec![filter("group-id", ids.to_vec())]).await?);
        }
        Ok(found)
    }

    /// The ids of the VPC's security groups that have an inbound rule whose description starts with `prefix`.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn security_group_ids_with_rule_description(
        &self,
        vpc_id: &str,
        prefix: &str,
    ) -> Answer<Vec<String>> {
        let mut found = Vec::new();
        let mut token = None;
        loop {
            self.0.ec2_describe.take().await;
            let call =
                self.0.ec2.describe_security_groups().filters(filter("vpc-id", vec![vpc_id.to_owned()]));
            let answer = call.max_results(1000).set_next_token(token).send().await;
            let answer =
                self.seen(CallClass::Ec2Describe, answer.map_err(|e| failed("DescribeSecurityGroups", &e)))?;
            for group in answer.security_groups() {
                let described = |text: Option<&str>| text.is_some_and(|text| text.starts_with(prefix));
                let ours = group.ip_permissions().iter().any(|permission| {
                    permission.user_id_group_pairs().iter().any(|pair| described(pair.description()))
                        || permission.ip_ranges().iter().any(|range| described(range.description()))
                        || permission.ipv6_ranges().iter().any(|range| described(range.description()))
                });
                if ours {
                    found.extend(group.group_id().map(str::to_owned));
                }
            }
            token = answer.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(found);
            }
        }
    }

    /// DescribeSecurityGroupRules: the inbound rules of one group, with their ids.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn security_group_rules(&self, group_id: &str) -> Answer<SecurityGroupRules> {
        let mut found = SecurityGroupRules::default();
        let mut token = None;
        loop {
            self.0.ec2_describe.take().await;
            let call = self.0.ec2.describe_security_group_rules();
            let call = call.filters(filter("group-id", vec![group_id.to_owned()]));
            let answer = call.max_results(1000).set_next_token(token).send().await;
            let answer = self
                .seen(CallClass::Ec2Describe, answer.map_err(|e| failed("DescribeSecurityGroupRules", &e)))?;
            for rule in answer.security_group_rules() {
                if rule.is_egress() == Some(true) {
                    continue;
                }
                match permission(rule) {
                    Some(permission) => found.rules.push(Rule {
                        id: rule.security_group_rule_id().unwrap_or_default().to_owned(),
                        permission,
                        description: rule.description().unwrap_or_default().to_owned(),
                    }),
                    None => found.others += 1,
                }
            }
            token = answer.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(found);
            }
        }
    }

    /// AuthorizeSecurityGroupIngress: all of them or none.
    ///
    /// # Errors
    /// What AWS answered; `InvalidPermission.Duplicate` if any is there already, whatever its description.
    pub async fn authorize(
        &self,
        group_id: &str,
        permissions: &[Permission],
        description: &str,
    ) -> Answer<()> {
        self.0.ec2_change.take().await;
        let permissions = permissions.iter().map(|p| ip_permission(p, description)).collect();
        let call = self.0.ec2.authorize_security_group_ingress().group_id(group_id);
        let answer = call.set_ip_permissions(Some(permissions)).send().await;
        self.seen(CallClass::Ec2Change, answer.map_err(|e| failed("AuthorizeSecurityGroupIngress", &e)))
            .map(drop)
    }

    /// RevokeSecurityGroupIngress by rule id, which is exact in every kind of VPC.
    ///
    /// # Errors
    /// What AWS answered; `InvalidSecurityGroupRuleId.NotFound` if any is gone.
    pub async fn revoke(&self, group_id: &str, rule_ids: &[String]) -> Answer<()> {
        self.0.ec2_change.take().await;
        let call = self.0.ec2.revoke_security_group_ingress().group_id(group_id);
        let answer = call.set_security_group_rule_ids(Some(rule_ids.to_vec())).send().await;
        self.seen(CallClass::Ec2Change, answer.map_err(|e| failed("RevokeSecurityGroupIngress", &e)))
            .map(drop)
    }

    /// ModifySecurityGroupRules: turns one rule into another, for groups that are full.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn modify_rule(
        &self,
        group_id: &str,
        rule_id: &str,
        permission: &Permission,
        description: &str,
    ) -> Answer<()> {
        self.0.ec2_change.take().await;
        let request = ec2::SecurityGroupRuleRequest::builder()
            .ip_protocol(permission.protocol.as_str())
            .from_port(permission.from_port.into())
            .to_port(permission.to_port.into())
            .description(description);
        let request = match &permission.source {
            Source::SecurityGroup(id) => request.referenced_group_id(id),
            Source::Cidr(cidr) if cidr.contains(':') => request.cidr_ipv6(cidr),
            Source::Cidr(cidr) => request.cidr_ipv4(cidr),
        };
        let update = ec2::SecurityGroupRuleUpdate::builder()
            .security_group_rule_id(rule_id)
            .security_group_rule(request.build())
            .build();
        let call = self.0.ec2.modify_security_group_rules().group_id(group_id).security_group_rules(update);
        let answer = call.send().await.map_err(|e| failed("ModifySecurityGroupRules", &e));
        self.seen(CallClass::Ec2Change, answer).map(drop)
    }

    // ---- details ----

    async fn describe_security_groups(&self, filters: Vec<ec2::Filter>) -> Answer<Vec<SecurityGroup>> {
        let mut found = Vec::new();
        let mut token = None;
        loop {
            self.0.ec2_describe.take().await;
            let call = self.0.ec2.describe_security_groups().set_filters(Some(filters.clone()));
            let answer = call.max_results(1000).set_next_token(token).send().await;
            let answer =
                self.seen(CallClass::Ec2Describe, answer.map_err(|e| failed("DescribeSecurityGroups", &e)))?;
            found.extend(answer.security_groups().iter().map(|group| {
                SecurityGroup {
                    id: group.group_id().unwrap_or_default().to_owned(),
                    tags: group
                        .tags()
                        .iter()
                        .filter_map(|t| Some((t.key()?.to_owned(), t.value().unwrap_or_default().to_owned())))
                        .collect(),
                }
            }));
            token = answer.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(found);
            }
        }
    }

    /// The ELBv2 client of our own identity or of an assumed role. Two callers that need a role at once make one
    /// client; its credentials are refreshed ahead of their end by the SDK.
    async fn elb(&self, role: Option<Role<'_>>) -> Answer<aws_sdk_elasticloadbalancingv2::Client> {
        let Some(role) = role else { return Ok(self.0.own.clone()) };
        let key = (role.role_arn.to_owned(), role.external_id.map(str::to_owned));
        let cell = self.0.assumed.lock().await.entry(key).or_default().clone();
        let client = cell.get_or_init(|| async {
            let provider = aws_config::sts::AssumeRoleProvider::builder(role.role_arn)
                .session_name(session_name(&self.0.cluster_name))
                .configure(&self.0.config);
            let provider = match role.external_id {
                Some(id) => provider.external_id(id),
                None => provider,
            };
            let config = aws_sdk_elasticloadbalancingv2::config::Builder::from(&self.0.config)
                .credentials_provider(provider.build().await)
                .build();
            aws_sdk_elasticloadbalancingv2::Client::from_conf(config)
        });
        Ok(client.await.clone())
    }

    /// Slows a class down when AWS throttled it.
    fn seen<T>(&self, class: CallClass, answer: Answer<T>) -> Answer<T> {
        if let Err(error) = &answer
            && error.class() == crate::error::Class::Throttled
        {
            match class {
                CallClass::ElbDescribe => self.0.elb_describe.throttled(),
                CallClass::ElbTargets => self.0.elb_targets.throttled(),
                CallClass::Ec2Describe => self.0.ec2_describe.throttled(),
                CallClass::Ec2Change => self.0.ec2_change.throttled(),
            }
        }
        answer
    }
}

/// STS takes session names of 2 to 64 characters out of `[\w+=,.@-]`.
fn session_name(cluster: &str) -> String {
    let allowed = |c: &char| c.is_ascii_alphanumeric() || "_+=,.@-".contains(*c);
    format!("tgb-{cluster}").chars().filter(allowed).take(64).collect()
}

fn failed<E>(
    operation: &'static str,
    error: &SdkError<E, aws_smithy_runtime_api::client::orchestrator::HttpResponse>,
) -> AwsError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let (code, message) = match error {
        SdkError::ServiceError(service) => (
            service
                .err()
                .code()
                .map_or_else(|| format!("Http{}", service.raw().status().as_u16()), str::to_owned),
            service.err().message().unwrap_or("no message").to_owned(),
        ),
        SdkError::TimeoutError(_) => ("Timeout".to_owned(), "AWS did not answer in time".to_owned()),
        SdkError::DispatchFailure(failure) => {
            let text = failure.as_connector_error().map_or_else(|| chain(error), |e| chain(e));
            let code = if text.contains("credential") || text.contains("assume") {
                "NoCredentials"
            } else {
                "Unreachable"
            };
            (code.to_owned(), text)
        }
        SdkError::ResponseError(response) => {
            (format!("Http{}", response.raw().status().as_u16()), "an answer that cannot be read".to_owned())
        }
        _ => {
            let text = chain(error);
            let code = if text.contains("credential") { "NoCredentials" } else { "Unreachable" };
            (code.to_owned(), text)
        }
    };
    // A server's failure without a code of its own may pass.
    let code = if code.starts_with("Http5") { "ServiceUnavailable".to_owned() } else { code };
    AwsError { operation, code, message }
}

/// An error with its causes, outermost first, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

fn filter(name: &str, values: Vec<String>) -> ec2::Filter {
    ec2::Filter::builder().name(name).set_values(Some(values)).build()
}

fn description(target: &Target) -> elb::TargetDescription {
    elb::TargetDescription::builder()
        .id(&target.id)
        .port(target.port.into())
        .set_availability_zone(target.zone.clone())
        .set_quic_server_id(target.quic_server_id.clone())
        .build()
}

fn target_group(group: &elb::TargetGroup) -> Option<TargetGroup> {
    Some(TargetGroup {
        arn: TargetGroupArn::parse(group.target_group_arn()?).ok()?,
        target_type: group.target_type().map(|t| t.as_str().to_owned()).unwrap_or_default(),
        protocol: group.protocol().map(|p| p.as_str().to_owned()).unwrap_or_default(),
        ip_address_type: group.ip_address_type().map(|t| t.as_str().to_owned()).unwrap_or_default(),
        vpc_id: group.vpc_id().map(str::to_owned),
        port: group.port().and_then(|port| u16::try_from(port).ok()),
        health_check_port: group.health_check_port().map(str::to_owned),
        load_balancer_arns: group.load_balancer_arns().to_vec(),
    })
}

fn observed_target(shown: &elb::TargetHealthDescription) -> Option<ObservedTarget> {
    let target = shown.target()?;
    let health = shown.target_health();
    let state = match health.and_then(|h| h.state()).map_or("unavailable", |s| s.as_str()) {
        "initial" => TargetState::Initial,
        "healthy" => TargetState::Healthy,
        "unhealthy" => TargetState::Unhealthy,
        "draining" | "unhealthy.draining" => TargetState::Draining,
        "unused" => TargetState::Unused,
        _ => TargetState::Unavailable,
    };
    Some(ObservedTarget {
        target: Target {
            id: target.id()?.to_owned(),
            port: target.port().and_then(|port| u16::try_from(port).ok()).unwrap_or_default(),
            zone: target.availability_zone().map(str::to_owned),
            quic_server_id: target.quic_server_id().map(str::to_owned),
        },
        state,
        reason: health.and_then(|h| h.reason()).map(|r| r.as_str().to_owned()),
        description: health.and_then(|h| h.description()).map(str::to_owned),
    })
}

fn instance_interface(instance: &ec2::Instance, eni: &ec2::InstanceNetworkInterface) -> NetworkInterface {
    let parsed = |text: Option<&str>| text.and_then(|text| text.parse().ok());
    NetworkInterface {
        id: eni.network_interface_id().unwrap_or_default().to_owned(),
        instance_id: instance.instance_id().map(str::to_owned),
        device_index: eni.attachment().and_then(|a| a.device_index()),
        addresses: (eni.private_ip_addresses().iter().filter_map(|a| parsed(a.private_ip_address())))
            .chain(eni.ipv6_addresses().iter().filter_map(|a| parsed(a.ipv6_address())))
            .collect(),
        prefixes: (eni.ipv4_prefixes().iter().filter_map(|p| p.ipv4_prefix()))
            .chain(eni.ipv6_prefixes().iter().filter_map(|p| p.ipv6_prefix()))
            .map(str::to_owned)
            .collect(),
        security_groups: eni.groups().iter().filter_map(|g| g.group_id()).map(str::to_owned).collect(),
    }
}

fn interface(eni: &ec2::NetworkInterface) -> NetworkInterface {
    let parsed = |text: Option<&str>| text.and_then(|text| text.parse().ok());
    NetworkInterface {
        id: eni.network_interface_id().unwrap_or_default().to_owned(),
        instance_id: eni.attachment().and_then(|a| a.instance_id()).map(str::to_owned),
        device_index: eni.attachment().and_then(|a| a.device_index()),
        addresses: (eni.private_ip_addresses().iter().filter_map(|a| parsed(a.private_ip_address())))
            .chain(eni.ipv6_addresses().iter().filter_map(|a| parsed(a.ipv6_address())))
            .collect(),
        prefixes: (eni.ipv4_prefixes().iter().filter_map(|p| p.ipv4_prefix()))
            .chain(eni.ipv6_prefixes().iter().filter_map(|p| p.ipv6_prefix()))
            .map(str::to_owned)
            .collect(),
        security_groups: eni.groups().iter().filter_map(|g| g.group_id()).map(str::to_owned).collect(),
    }
}

fn permission(rule: &ec2::SecurityGroupRule) -> Option<Permission> {
    let protocol = match rule.ip_protocol()? {
        "tcp" | "6" => RuleProtocol::Tcp,
        "udp" | "17" => RuleProtocol::Udp,
        _ => return None,
    };
    let source = if let Some(group) = rule.referenced_group_info().and_then(|info| info.group_id()) {
        Source::SecurityGroup(group.to_owned())
    } else {
        Source::Cidr(rule.cidr_ipv4().or_else(|| rule.cidr_ipv6())?.to_owned())
    };
    Some(Permission {
        protocol,
        from_port: u16::try_from(rule.from_port()?).ok()?,
        to_port: u16::try_from(rule.to_port()?).ok()?,
        source,
    })
}

fn ip_permission(permission: &Permission, description: &str) -> ec2::IpPermission {
    let built = ec2::IpPermission::builder()
        .ip_protocol(permission.protocol.as_str())
        .from_port(permission.from_port.into())
        .to_port(permission.to_port.into());
    match &permission.source {
        Source::SecurityGroup(id) => built.user_id_group_pairs(
            ec2::UserIdGroupPair::builder().group_id(id).description(description).build(),
        ),
        Source::Cidr(cidr) if cidr.contains(':') => {
            built.ipv6_ranges(ec2::Ipv6Range::builder().cidr_ipv6(cidr).description(description).build())
        }
        Source::Cidr(cidr) => {
            built.ip_ranges(ec2::IpRange::builder().cidr_ip(cidr).description(description).build())
        }
    }
    .build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_name_is_one_that_sts_takes() {
        assert_eq!(session_name("my/cluster é1"), "tgb-mycluster1");
        assert_eq!(session_name(&"x".repeat(100)).len(), 64);
    }
}
