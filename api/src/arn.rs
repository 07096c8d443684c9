//! Amazon Resource Names of target groups.

use crate::text::excerpt;
use std::fmt;
use std::sync::Arc;

/// The ARN of an ELBv2 target group, in any partition:
/// `arn:PARTITION:elasticloadbalancing:REGION:ACCOUNT:targetgroup/NAME/ID`.
///
/// Looser than AWS about the width of the id, so that an ARN is never refused for a form that AWS may introduce.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetGroupArn(Arc<str>);

/// Why a text is no target group ARN; the text reads well after "is".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ArnError {
    /// An ARN with blanks before or after it.
    #[error("a target group ARN with blanks around it; remove them")]
    Blanks,
    /// Not an ARN at all.
    #[error("not an ARN; expected arn:PARTITION:elasticloadbalancing:REGION:ACCOUNT:targetgroup/NAME/ID")]
    NotAnArn,
    /// An ARN of another service.
    #[error("an ARN of the service {0}, not of elasticloadbalancing")]
    OtherService(String),
    /// The ARN of a load balancer, listener or rule.
    #[error(
        "the ARN of a {0}, not of a target group; use the target group's ARN (it has \":targetgroup/\" in it)"
    )]
    OtherResource(&'static str),
    /// An ELBv2 target group ARN whose named part is malformed.
    #[error("a target group ARN with a malformed {0}")]
    Malformed(&'static str),
}

impl TargetGroupArn {
    /// Parses an ARN.
    ///
    /// # Errors
    /// Says what the text is instead, so that a user sees what to write.
    pub fn parse(text: &str) -> Result<Self, ArnError> {
        let trimmed = text.trim();
        if trimmed != text {
            return Err(Self::parse(trimmed).map_or_else(|error| error, |_| ArnError::Blanks));
        }
        let mut parts = text.splitn(6, ':');
        let mut next = || parts.next().ok_or(ArnError::NotAnArn);
        if next()? != "arn" {
            return Err(ArnError::NotAnArn);
        }
        let (partition, service, region, account, resource) = (next()?, next()?, next()?, next()?, next()?);
        if service != "elasticloadbalancing" {
            return Err(ArnError::OtherService(excerpt(service).into_owned()));
        }
        let (kind, rest) = resource.split_once('/').ok_or(ArnError::NotAnArn)?;
        match kind {
            "targetgroup" => {}
            "loadbalancer" => return Err(ArnError::OtherResource("load balancer")),
            "listener" => return Err(ArnError::OtherResource("listener")),
            "listener-rule" => return Err(ArnError::OtherResource("listener rule")),
            "truststore" => return Err(ArnError::OtherResource("trust store")),
            _ => return Err(ArnError::NotAnArn),
        }
        if !(partition == "aws" || partition.starts_with("aws-")) || !is_words(partition) {
            return Err(ArnError::Malformed("partition"));
        }
        if region.is_empty() || !is_words(region) {
            return Err(ArnError::Malformed("region"));
        }
        if account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()) {
            return Err(ArnError::Malformed("account"));
        }
        let (name, id) = rest.split_once('/').ok_or(ArnError::Malformed("name"))?;
        if name.is_empty() || name.len() > 32 || !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        {
            return Err(ArnError::Malformed("name"));
        }
        if id.is_empty() || id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return Err(ArnError::Malformed("id"));
        }
        Ok(Self(Arc::from(text)))
    }

    /// The ARN as written.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `aws`, `aws-cn`, `aws-us-gov`, …
    pub fn partition(&self) -> &str {
        self.part(1)
    }

    /// The region, as in `eu-west-1`.
    pub fn region(&self) -> &str {
        self.part(3)
    }

    /// The twelve digits of the account.
    pub fn account(&self) -> &str {
        self.part(4)
    }

    /// `targetgroup/NAME/ID`, which is as long as an excerpt may be.
    pub fn resource(&self) -> &str {
        self.part(5)
    }

    /// The target group's name.
    pub fn name(&self) -> &str {
        self.part(5).split('/').nth(1).unwrap_or_default()
    }

    /// True for two target groups of one name in one account and region: the one was deleted, and the other made in its place.
    pub fn replaces(&self, other: &Self) -> bool {
        let place = |arn: &Self| arn.0.rsplit_once('/').map(|(place, _)| place.to_owned());
        self != other && place(self) == place(other)
    }

    fn part(&self, index: usize) -> &str {
        self.0.splitn(6, ':').nth(index).unwrap_or_default()
    }
}

impl fmt::Display for TargetGroupArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TargetGroupArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_words(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn target_group_arns_of_every_partition_are_read() {
        for (partition, region) in [
            ("aws", "us-east-1"),
            ("aws-cn", "cn-north-1"),
            ("aws-us-gov", "us-gov-west-1"),
            ("aws-eusc", "eusc-de-east-1"),
            ("aws-iso-b", "us-isob-east-1"),
        ] {
            let text = format!(
                "arn:{partition}:elasticloadbalancing:{region}:123456789012:targetgroup/web/1ce5b7da835c9ffb"
            );
            let arn = TargetGroupArn::parse(&text).unwrap();
            assert_eq!(
                (arn.partition(), arn.region(), arn.account(), arn.name()),
                (partition, region, "123456789012", "web")
            );
        }
    }

    #[test]
    fn other_arns_are_named_as_what_they_are() {
        let of = |resource: &str| {
            TargetGroupArn::parse(&format!("arn:aws:elasticloadbalancing:us-east-1:123456789012:{resource}"))
        };
        assert_eq!(
            of("loadbalancer/app/web/50dc6c495c0c9188"),
            Err(ArnError::OtherResource("load balancer"))
        );
        assert_eq!(
            of("listener/app/web/50dc6c495c0c9188/f2f7dc8efc522ab2"),
            Err(ArnError::OtherResource("listener"))
        );
        assert_eq!(of("listener-rule/app/w/5/f/9"), Err(ArnError::OtherResource("listener rule")));
        assert_eq!(of("targetgroup/web"), Err(ArnError::Malformed("name")));
        assert_eq!(TargetGroupArn::parse("arn:aws:s3:::bucket"), Err(ArnError::OtherService("s3".into())));
        assert_eq!(TargetGroupArn::parse("web"), Err(ArnError::NotAnArn));
        assert_eq!(TargetGroupArn::parse(""), Err(ArnError::NotAnArn));
    }
}
