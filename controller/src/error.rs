//! Why a pass could not be done.

use tgb_aws::AwsError;

/// See the members.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// AWS did not do what it was asked.
    #[error(transparent)]
    Aws(#[from] AwsError),
    /// The API server did not.
    #[error("{0}: {1}")]
    Cluster(&'static str, kube::Error),
    /// A rule that is enforced here, too.
    #[error("{0}")]
    Refused(String),
    /// Something else stands in the way.
    #[error("{0}")]
    Held(&'static str),
}

impl Error {
    /// The API server did not write `what`.
    pub(crate) fn cluster(what: &'static str, error: kube::Error) -> Self {
        Self::Cluster(what, error)
    }

    pub(crate) fn is_target_group_not_found(&self) -> bool {
        matches!(self, Self::Aws(error) if error.is_target_group_not_found())
    }
}
