//! Why a pass could not be done.

use tgb_aws::AwsError;

/// Why a pass failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// AWS did not do what it was asked.
    #[error(transparent)]
    Aws(#[from] AwsError),
    /// The API server did not.
    #[error("{0}: {said}", said = tgb_process::told(.1))]
    Cluster(&'static str, kube::Error),
    /// The ConfigMap of a Shared binding's targets may not be touched.
    #[error("{said}; the chart value sharedTargets.namespaces lists the namespaces where it may", said = tgb_process::told(.0))]
    TrackingForbidden(kube::Error),
    /// A rule that is enforced here, too.
    #[error("{0}")]
    Refused(String),
    /// Something else stands in the way.
    #[error("{0}")]
    Held(&'static str),
}

impl Error {
    /// The API server did not read or write `what`.
    pub(crate) fn cluster(what: &'static str, error: kube::Error) -> Self {
        Self::Cluster(what, error)
    }

    /// The API server did not read or write the ConfigMap of a Shared binding's targets.
    pub(crate) fn tracking(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.is_forbidden() => {
                Self::TrackingForbidden(kube::Error::Api(status))
            }
            other => Self::Cluster("the ConfigMap of targets", other),
        }
    }

    pub(crate) fn is_target_group_not_found(&self) -> bool {
        matches!(self, Self::Aws(error) if error.is_target_group_not_found())
    }
}
