//! Which target group a binding means, whether it may use it, and what AWS wants to hear of its targets there.

use super::{Memory, Outcome, Worker, node_zones};
use crate::desired::{Desired, TargetKey};
use crate::ownership::{self, Refusal};
use crate::reason::{Kind, Reason};
use crate::status::Report;
use crate::zones::Zones;
use ipnet::IpNet;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use tgb_api::target_group::{TargetGroup, TargetType};
use tgb_api::v1::TargetGroupBinding;
use tgb_aws::values::Target;
use tgb_aws::{Aws, AwsError, Class, TargetGroupQuery};
use tokio::time::Instant;
use tracing::{debug, warn};

/// Why a target group may not be used.
pub(super) enum Unresolved {
    Refused(Refusal),
    Failed(AwsError),
}

impl Worker {
    /// The target group, from memory or from AWS, and whether the rules that are enforced here again let it through.
    pub(super) async fn resolve(
        &mut self,
        binding: &TargetGroupBinding,
        report: &mut Report,
    ) -> Result<TargetGroup, Outcome> {
        let kind = Kind::TargetGroupResolved;
        match self.find_group(binding).await {
            Ok(group) => Ok(group),
            Err(Unresolved::Refused(refusal)) => {
                report.stalled(kind, refusal.reason, refusal.message);
                Err(match refusal.reason {
                    Reason::TargetGroupNotFound => Outcome::Failed,
                    _ => Outcome::Done(None),
                })
            }
            Err(Unresolved::Failed(error)) => {
                warn!(binding = %self.key, %error, "the target group is not known");
                if error.is_access_denied() {
                    report.stalled(kind, Reason::AccessDenied, error.to_string());
                } else {
                    report.bad(kind, Reason::AwsUnavailable, error.to_string());
                }
                Err(Outcome::Failed)
            }
        }
    }

    pub(super) async fn find_group(
        &mut self,
        binding: &TargetGroupBinding,
    ) -> Result<TargetGroup, Unresolved> {
        let ctx = Arc::clone(&self.ctx);
        let reference = &binding.spec.target_group;
        let refused = |group: Option<&TargetGroup>, tags: Option<&BTreeMap<String, String>>| {
            ownership::refused(&ctx.settings.rules, binding, group, tags)
                .map_or(Ok(()), |r| Err(Unresolved::Refused(r)))
        };
        refused(None, None)?;
        let from = (
            reference.arn().map(str::to_owned),
            reference.name().map(str::to_owned),
            reference.role().map(|role| role.role_arn.to_owned()),
        );
        if self.memory.resolved_from.as_ref() != Some(&from) {
            let writes = std::mem::take(&mut self.memory.writes);
            self.memory = Memory { resolved_from: Some(from), writes, ..Default::default() };
        }
        let is_fresh = self.memory.group_read.is_some_and(|at| at.elapsed() < ctx.settings.resync);
        if self.memory.group.is_none() || !is_fresh {
            let aws = self.aws(binding);
            let answer = self.describe(&aws, binding).await;
            match answer {
                Ok(groups) => {
                    let group = groups.into_iter().next();
                    let arn = group.as_ref().map(|group| group.arn.as_str().to_owned());
                    if arn.is_some() && self.memory.arn.is_some() && arn != self.memory.arn {
                        self.forget_group();
                    }
                    self.memory.arn = arn.or_else(|| self.memory.arn.take());
                    self.memory.group = group;
                    self.memory.group_read = Some(Instant::now());
                    self.memory.group_is_gone = self.memory.group.is_none();
                    (self.memory.tags, self.memory.zones) = (None, Zones::default());
                }
                Err(error) if error.is_target_group_not_found() => {
                    (self.memory.group, self.memory.group_is_gone) = (None, true);
                }
                // What is known will do until AWS answers again.
                Err(error) if self.memory.group.is_some() && error.class() != Class::Terminal => {
                    debug!(binding = %self.key, %error, "the target group could not be read again");
                }
                Err(error) => return Err(Unresolved::Failed(error)),
            }
        }
        let Some(group) = self.memory.group.clone() else {
            let message = match (reference.arn(), reference.name()) {
                (Some(arn), Some(name)) => format!(
                    "TGB110 there is no target group {arn} in this account and region, nor another of the name {name}"
                ),
                (arn, name) => {
                    let named = arn.or(name).unwrap_or_default();
                    format!("TGB110 there is no target group {named} in this account and region")
                }
            };
            let refusal = Refusal { rule: "TGB110", reason: Reason::TargetGroupNotFound, message };
            return Err(Unresolved::Refused(refusal));
        };
        if self.memory.tags.is_none() && ctx.settings.rules.wants_tags() {
            let tags = self.aws(binding).tags(reference.role(), group.arn.as_str()).await;
            self.memory.tags = Some(tags.map_err(Unresolved::Failed)?);
        }
        refused(Some(&group), self.memory.tags.as_ref())?;
        Ok(group)
    }

    /// Asks AWS for the target group that a binding names. Where its ARN is gone and the binding has a name too, which the
    /// webhook has filled the ARN in from, a target group that was made anew under this name takes its place.
    async fn describe(&self, aws: &Aws, binding: &TargetGroupBinding) -> Result<Vec<TargetGroup>, AwsError> {
        let reference = &binding.spec.target_group;
        let role = reference.role();
        let status = self.memory.writes.status(binding);
        let resolved = status.and_then(|status| status.target_group_arn.as_deref());
        let replacement = resolved.filter(|resolved| reference.is_replaced_by(resolved));
        let by_name = TargetGroupQuery::Name(reference.name().unwrap_or_default());
        let Some(arn) = replacement.or(reference.arn()) else {
            return aws.target_groups(role, by_name).await;
        };
        let found = if resolved == Some(arn) && !self.memory.group_is_gone {
            // Together with others: one that is not there fails them all, so that it is known to have been.
            aws.known_target_group(role, arn).await.map(|group| vec![group])
        } else {
            aws.target_groups(role, TargetGroupQuery::Arn(arn)).await
        };
        let is_gone = match &found {
            Ok(groups) => groups.is_empty(),
            Err(error) => error.is_target_group_not_found(),
        };
        if !is_gone || reference.name().is_none() || reference.arn().is_none() {
            return found;
        }
        let mut groups = aws.target_groups(role, by_name).await?;
        groups.retain(|group| reference.is_replaced_by(group.arn.as_str()));
        Ok(groups)
    }

    /// Forgets what is known of the targets of a group that another one replaces.
    fn forget_group(&mut self) {
        let Memory { resolved_from, writes, failures, told, named, .. } = std::mem::take(&mut self.memory);
        self.memory = Memory { resolved_from, writes, failures, told, named, ..Memory::default() };
    }

    /// The wanted targets with their zones, and the subnets that these follow from.
    pub(super) async fn zoned(
        &mut self,
        binding: &TargetGroupBinding,
        group: &TargetGroup,
        wanted: &Desired,
    ) -> Result<(Arc<Vec<IpNet>>, BTreeMap<TargetKey, Target>), AwsError> {
        let mut targets: BTreeMap<TargetKey, Target> =
            wanted.targets.iter().map(|(key, wanted)| (key.clone(), wanted.target.clone())).collect();
        let is_ip = group.binding_target_type() == Some(TargetType::Ip);
        let (true, Some(vpc), false) = (is_ip, group.vpc_id.as_deref(), targets.is_empty()) else {
            return Ok((Arc::default(), targets));
        };
        let ips: Vec<IpAddr> = targets.keys().filter_map(|key| key.id.parse().ok()).collect();
        let subnets = self.ctx.subnets(vpc, &ips).await?;
        if self.memory.zones.wants_attributes(group, &ips, &subnets) {
            let role = binding.spec.target_group.role();
            match self.ctx.aws.target_group_attributes(role, group.arn.as_str()).await {
                Ok(attributes) => self.memory.zones.read_attributes(&attributes),
                // AWS says it again when targets are registered.
                Err(error) => {
                    debug!(binding = %self.key, %error, "the target group's attributes are not known")
                }
            }
        }
        let nodes = node_zones(wanted);
        for (key, target) in &mut targets {
            let ip = target.id.parse().ok();
            target.zone = ip.and_then(|ip| self.memory.zones.of(&ip, &subnets, nodes.get(key).copied()));
        }
        Ok((subnets, targets))
    }
}
