//! Credentials of assumed roles.

use crate::client::{Inner, Sent, failed};
use crate::error::{AwsError, Class};
use crate::limits::{Budget, CallClass};
use crate::metrics::Metrics;
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, future};
use aws_smithy_types::error::metadata::ProvideErrorMetadata;
use std::sync::Arc;
use std::time::SystemTime;
use tgb_api::v1::Role;
use tokio::time::Instant;

pub(crate) type RoleClient = aws_sdk_elasticloadbalancingv2::Client;

/// The action of STS.
pub(crate) const ASSUME_ROLE: &str = "AssumeRole";

/// A client with the credentials of a role. The SDK asks for them once at a time and ahead of their end.
pub(crate) fn client(inner: &Inner, role: Role<'_>) -> RoleClient {
    let provider = AssumedRole {
        sts: aws_sdk_sts::Client::new(&inner.config),
        role: role.role_arn.to_owned(),
        external_id: role.external_id.filter(|id| !id.is_empty()).map(str::to_owned),
        session: session_name(&inner.cluster_name),
        metrics: inner.metrics.clone(),
        budget: Arc::clone(&inner.budget),
    };
    let config = aws_sdk_elasticloadbalancingv2::config::Builder::from(&inner.config)
        .credentials_provider(provider)
        .build();
    RoleClient::from_conf(config)
}

struct AssumedRole {
    sts: aws_sdk_sts::Client,
    role: String,
    external_id: Option<String>,
    session: String,
    metrics: Metrics,
    /// Our own account's, whose calls these are.
    budget: Arc<Budget>,
}

impl std::fmt::Debug for AssumedRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AssumedRole").field("role", &self.role).finish_non_exhaustive()
    }
}

impl ProvideCredentials for AssumedRole {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async {
            self.assume().await.map_err(CredentialsError::provider_error)
        })
    }
}

impl AssumedRole {
    async fn assume(&self) -> Result<Credentials, AwsError> {
        let call = self
            .sts
            .assume_role()
            .role_arn(&self.role)
            .role_session_name(&self.session)
            .set_external_id(self.external_id.clone());
        let mut answer = self.count(call.clone().send()).await;
        if answer.as_ref().is_err_and(|error| error.class() == Class::Retry) {
            self.metrics.repeated(CallClass::Sts, ASSUME_ROLE);
            answer = self.count(call.send()).await;
        }
        let answer = answer?;
        let Some(given) = answer.credentials() else {
            return Err(AwsError {
                operation: ASSUME_ROLE,
                code: "InternalError".to_owned(),
                message: "an answer without credentials".to_owned(),
            });
        };
        Ok(Credentials::new(
            given.access_key_id(),
            given.secret_access_key(),
            Some(given.session_token().to_owned()),
            SystemTime::try_from(*given.expiration()).ok(),
            "AssumeRole",
        ))
    }
}

impl AssumedRole {
    /// Sends a call within the budget, and counts it.
    async fn count<T, E>(&self, send: impl Future<Output = Sent<T, E>>) -> Result<T, AwsError>
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let begun = Instant::now();
        self.budget.take(CallClass::Sts, true).await;
        self.metrics.waited(CallClass::Sts, begun.elapsed());
        let begun = Instant::now();
        let answer = send.await.map_err(|error| failed(ASSUME_ROLE, &error));
        let error = answer.as_ref().err();
        if error.is_some_and(|error| error.class() == Class::Throttled) {
            self.budget.throttled(CallClass::Sts);
        }
        self.metrics.called(
            CallClass::Sts,
            ASSUME_ROLE,
            error.map(|error| error.code.as_str()),
            begun.elapsed(),
        );
        answer
    }
}

/// STS takes session names of 2 to 64 characters out of `[\w+=,.@-]`.
fn session_name(cluster: &str) -> String {
    let allowed = |c: &char| c.is_ascii_alphanumeric() || "_+=,.@-".contains(*c);
    format!("tgb-{cluster}").chars().filter(allowed).take(64).collect()
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
