//! What a pass has to do with security groups.

use super::{Found, Outcome, Worker};
use crate::network::{Claim, anywhere};
use crate::reason::{Kind, Reason};
use crate::security;
use crate::status::Report;
use std::collections::BTreeMap;
use std::sync::Arc;
use tgb_api::v1::TargetGroupBinding;

impl Worker {
    /// Claims the rules that the targets found need, and says how they stand.
    pub(super) async fn networking(
        &mut self,
        binding: &Arc<TargetGroupBinding>,
        found: &Result<Found, Outcome>,
        report: &mut Report,
    ) -> Outcome {
        let outcome = match found {
            Ok(found) => found.outcome,
            Err(outcome) => *outcome,
        };
        if binding.spec.networking.is_none() {
            security::put_claim(&self.ctx, &self.key, Claim::Groups(BTreeMap::new()));
            return outcome;
        }
        let keeps = || match security::claim_of(&self.ctx, &self.key) {
            Some(Claim::Groups(groups)) if !groups.is_empty() => Claim::Groups(groups),
            _ => anywhere(binding),
        };
        let claim = match found {
            Ok(Found { wanted, group, .. }) if !wanted.targets.is_empty() => {
                let vpc = self.ctx.aws.vpc_id().or(group.vpc_id.as_deref());
                match security::claim(&self.ctx, binding, &wanted.targets, vpc).await {
                    Ok((claim, problem)) => {
                        if let Some((reason, message)) = problem {
                            report.bad(Kind::NetworkingReady, reason, message);
                        }
                        Some(claim)
                    }
                    Err(error) => {
                        report.bad(Kind::NetworkingReady, Reason::AccessDenied, error.to_string());
                        let claim = match keeps() {
                            known @ Claim::Groups(_) => known,
                            _ => Claim::Unknown,
                        };
                        security::put_claim(&self.ctx, &self.key, claim);
                        return Outcome::Failed;
                    }
                }
            }
            // No endpoint, or sick for good: it keeps the rules that it had.
            Ok(_) | Err(Outcome::Done(_)) => Some(keeps()),
            Err(Outcome::Failed) if self.memory.group_is_gone => Some(keeps()),
            Err(Outcome::Failed) => None,
        };
        match claim {
            Some(claim) => security::put_claim(&self.ctx, &self.key, claim),
            None if security::claim_of(&self.ctx, &self.key).is_none() => {
                security::put_claim(&self.ctx, &self.key, Claim::Unknown);
            }
            None => {}
        }
        match security::standing(&self.ctx, &self.key) {
            security::Standing::Authorized(groups) => {
                let message = format!("{groups} security groups have the rules");
                report.ok(Kind::NetworkingReady, Reason::Authorized, message);
            }
            security::Standing::Failed(reason, message) => report.bad(Kind::NetworkingReady, reason, message),
            security::Standing::Pending => {
                let message = "the security groups are not done yet";
                report.unknown(Kind::NetworkingReady, Reason::Pending, message);
            }
        }
        outcome
    }
}
