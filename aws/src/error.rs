//! What went wrong at AWS, and what to do about it.

/// What to do about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// The same call may go through later.
    Retry,
    /// The same call will fail again until a person or another call changes something.
    Terminal,
    /// AWS (or our own budget) asks for patience; only this class of calls slows down.
    Throttled,
}

/// An AWS call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{operation}: {code}: {message}")]
pub struct AwsError {
    /// The action, as in `RegisterTargets`.
    pub operation: &'static str,
    /// AWS's code, as in `TargetGroupNotFound`; ours for failures without an answer: `Timeout`, `Unreachable`,
    /// `NoCredentials`, `CredentialsUnavailable`, `NotLeading`.
    pub code: String,
    /// AWS's sentence.
    pub message: String,
}

impl AwsError {
    /// What to do about it. Codes as AWS's SDKs class them (AWS SDK reference guide, "Retry behavior").
    pub fn class(&self) -> Class {
        match self.code.as_str() {
            "Throttling"
            | "ThrottlingException"
            | "ThrottledException"
            | "RequestThrottled"
            | "RequestThrottledException"
            | "TooManyRequestsException"
            | "RequestLimitExceeded"
            | "BandwidthLimitExceeded"
            | "SlowDown"
            | "PriorRequestNotComplete"
            | "EC2ThrottledException" => Class::Throttled,
            "Timeout"
            | "Unreachable"
            | "RequestTimeout"
            | "RequestTimeoutException"
            | "InternalError"
            | "InternalFailure"
            | "ServiceUnavailable"
            | "Unavailable"
            | "HealthUnavailable"
            | "CredentialsUnavailable"
            | "NotLeading"
            | "ExpiredToken"
            | "ExpiredTokenException"
            | "RequestExpired" => Class::Retry,
            _ => Class::Terminal,
        }
    }

    /// AWS does not answer, or only that it can't now: other calls of the service will fare no better.
    pub fn is_outage(&self) -> bool {
        self.class() == Class::Retry
            && !matches!(
                self.code.as_str(),
                "HealthUnavailable"
                    | "CredentialsUnavailable"
                    | "NotLeading"
                    | "ExpiredToken"
                    | "ExpiredTokenException"
                    | "RequestExpired"
            )
    }

    /// There is no such target group (DescribeTargetGroups, RegisterTargets, …). DescribeTargetGroups says of an ARN of another
    /// account or region, and of a name that can't be one, that it is not valid: an answer as well, no outage.
    pub fn is_target_group_not_found(&self) -> bool {
        matches!(self.code.as_str(), "TargetGroupNotFound" | "TargetGroupNotFoundException")
            || (self.operation == "DescribeTargetGroups" && self.code == "ValidationError")
    }

    /// AWS refuses the caller: a missing permission, or credentials that do not hold.
    pub fn is_access_denied(&self) -> bool {
        matches!(
            self.code.as_str(),
            "AccessDenied"
                | "AccessDeniedException"
                | "UnauthorizedOperation"
                | "AuthFailure"
                | "InvalidClientTokenId"
                | "UnrecognizedClientException"
                | "SignatureDoesNotMatch"
                | "OptInRequired"
                | "NoCredentials"
        )
    }

    /// A target group or load balancer is full.
    pub fn is_target_limit(&self) -> bool {
        matches!(self.code.as_str(), "TooManyTargets" | "TooManyTargetsException")
    }

    /// AWS refuses targets of the call about the target group `arn`, and not the call as such.
    pub fn is_about_targets(&self, arn: &str) -> bool {
        matches!(self.code.as_str(), "InvalidTarget" | "ValidationError" | "TooManyRegistrationsForTargetId")
            && !self.message.contains(arn)
    }
}
