//! Calls of Elastic Load Balancing v2.

use crate::client::{Answer, Aws, Elb};
use crate::limits::CallClass;
use crate::values::*;
use aws_sdk_elasticloadbalancingv2::types as elb;
use std::collections::BTreeMap;
use tgb_api::arn::TargetGroupArn;
use tgb_api::target_group::TargetGroup;
use tgb_api::v1::Role;

/// Which target groups to describe. One that does not exist fails the whole call, so never ask for strangers
/// together.
#[derive(Debug, Clone, Copy)]
pub enum TargetGroupQuery<'a> {
    /// One, by its ARN.
    Arn(&'a str),
    /// One, by its name.
    Name(&'a str),
    /// Several, by ARN; at most 20.
    Arns(&'a [String]),
}

impl Aws {
    /// DescribeTargetGroups.
    ///
    /// # Errors
    /// What AWS answered; `TargetGroupNotFound` if any of them does not exist.
    pub async fn target_groups(
        &self,
        role: Option<Role<'_>>,
        query: TargetGroupQuery<'_>,
    ) -> Answer<Vec<TargetGroup>> {
        let elb = self.client_for(role).await;
        self.describe_target_groups(&elb, query).await
    }

    /// DescribeTargetGroups of one that was there before, by its ARN: together with others of the kind that are asked for
    /// meanwhile.
    ///
    /// # Errors
    /// What AWS answered; `TargetGroupNotFound` if it does not exist any more.
    pub async fn known_target_group(&self, role: Option<Role<'_>>, arn: &str) -> Answer<TargetGroup> {
        let elb = self.client_for(role).await;
        let aws = self.clone();
        let call = move |arns: Vec<String>| {
            let (aws, elb) = (aws.clone(), elb.clone());
            async move {
                let found = aws.describe_target_groups(&elb, TargetGroupQuery::Arns(&arns)).await?;
                Ok(found.into_iter().map(|group| (group.arn.as_str().to_owned(), group)).collect())
            }
        };
        self.joined(role).ask(arn, call).await
    }

    async fn describe_target_groups(
        &self,
        elb: &Elb,
        query: TargetGroupQuery<'_>,
    ) -> Answer<Vec<TargetGroup>> {
        let call = elb.client.describe_target_groups();
        let call = match query {
            TargetGroupQuery::Arn(arn) => call.target_group_arns(arn),
            TargetGroupQuery::Name(name) => call.names(name),
            TargetGroupQuery::Arns(arns) => call.set_target_group_arns(Some(arns.to_vec())),
        };
        let mut found = Vec::new();
        let mut marker: Option<String> = None;
        loop {
            let send = || call.clone().set_marker(marker.clone()).send();
            let answer = self.elb(elb, CallClass::ElbDescribe, "DescribeTargetGroups", send).await?;
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
        let elb = self.client_for(role).await;
        let send = || elb.client.describe_tags().resource_arns(arn).send();
        let answer = self.elb(&elb, CallClass::ElbDescribe, "DescribeTags", send).await?;
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
        let elb = self.client_for(role).await;
        let send = || elb.client.describe_target_group_attributes().target_group_arn(arn).send();
        let answer = self.elb(&elb, CallClass::ElbDescribe, "DescribeTargetGroupAttributes", send).await?;
        let attributes = answer.attributes().iter();
        Ok(attributes.filter_map(|a| Some((a.key()?.to_owned(), a.value()?.to_owned()))).collect())
    }

    /// DescribeTargetHealth of everything that is registered.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn target_health(&self, role: Option<Role<'_>>, arn: &str) -> Answer<Vec<ObservedTarget>> {
        let elb = self.client_for(role).await;
        let send = || elb.client.describe_target_health().target_group_arn(arn).send();
        let answer = self.elb(&elb, CallClass::ElbDescribe, "DescribeTargetHealth", send).await?;
        Ok(answer.target_health_descriptions().iter().filter_map(observed_target).collect())
    }

    /// RegisterTargets, one call; the caller keeps to at most 200 targets.
    ///
    /// # Errors
    /// What AWS answered. One bad target fails the whole call.
    pub async fn register(&self, role: Option<Role<'_>>, arn: &str, targets: &[Target]) -> Answer<()> {
        let elb = self.client_for(role).await;
        let targets: Vec<_> = targets.iter().map(description).collect();
        let call = elb.client.register_targets().target_group_arn(arn).set_targets(Some(targets));
        let send = || call.clone().send();
        self.elb(&elb, CallClass::ElbTargets, "RegisterTargets", send).await.map(drop)
    }

    /// DeregisterTargets, one call; the caller keeps to at most 200 targets. An unknown target is no error to AWS.
    ///
    /// # Errors
    /// What AWS answered.
    pub async fn deregister(&self, role: Option<Role<'_>>, arn: &str, targets: &[Target]) -> Answer<()> {
        let elb = self.client_for(role).await;
        let targets: Vec<_> = targets.iter().map(description).collect();
        let call = elb.client.deregister_targets().target_group_arn(arn).set_targets(Some(targets));
        let send = || call.clone().send();
        self.elb(&elb, CallClass::ElbTargets, "DeregisterTargets", send).await.map(drop)
    }

    /// Whether ELBv2 answers; what it says does not matter.
    pub(crate) async fn probe_elb(&self) {
        let elb = self.client_for(None).await;
        let send = || elb.client.describe_target_groups().page_size(1).send();
        // The answer is noted on the way.
        let _ = self.elb(&elb, CallClass::ElbDescribe, "DescribeTargetGroups", send).await;
    }
}

// ---- details ----

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
    let reason = health.and_then(|h| h.reason()).map(|r| r.as_str().to_owned());
    if reason.as_deref() == Some(NOT_REGISTERED) {
        return None;
    }
    Some(ObservedTarget {
        target: Target {
            id: target.id()?.to_owned(),
            port: target.port().and_then(|port| u16::try_from(port).ok()).unwrap_or_default(),
            zone: target.availability_zone().map(str::to_owned),
            quic_server_id: target.quic_server_id().map(str::to_owned),
        },
        state: health
            .and_then(|h| h.state())
            .map_or(TargetState::Unavailable, |s| TargetState::parse(s.as_str())),
        reason,
        description: health.and_then(|h| h.description()).map(str::to_owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(word: &str, reason: Option<&str>) -> Option<TargetState> {
        let health = elb::TargetHealth::builder()
            .state(elb::TargetHealthStateEnum::from(word))
            .set_reason(reason.map(elb::TargetHealthReasonEnum::from));
        let target = elb::TargetDescription::builder().id("10.0.0.1").port(80).build();
        let shown =
            elb::TargetHealthDescription::builder().target(target).target_health(health.build()).build();
        observed_target(&shown).map(|seen| seen.state)
    }

    #[test]
    fn every_state_of_aws_is_read_whatever_its_reason() {
        for (state, word, reasons) in TARGET_STATES {
            assert_eq!((shown(word, None), state.as_str()), (Some(state), word));
            for reason in reasons {
                let is_there = *reason != NOT_REGISTERED;
                assert_eq!(shown(word, Some(reason)), is_there.then_some(state), "{word} {reason}");
            }
            assert_eq!(state.is_registered(), word != "draining");
        }
        assert_eq!(shown("new.word", None), Some(TargetState::Unavailable));
    }
}
