//! What we write of a binding: its status and our finalizer, by merge patch with resourceVersion, and only what changed.

use crate::context::Ctx;
use crate::status::{self, Report};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use std::time::Duration;
use tgb_api::names;
use tgb_api::v1::{Status, TargetGroupBinding};
use tokio::time::Instant;
use tracing::warn;

/// Counts are written at most this often, and other words about the same reason.
const COUNTS_EVERY: Duration = Duration::from_secs(15);
const WORDS_EVERY: Duration = Duration::from_secs(2);
/// After how long a write is tried again: somebody else wrote, or the API server failed.
const CONFLICT: Duration = Duration::from_millis(200);
const FAILURE: Duration = Duration::from_secs(1);

/// What we wrote last, which the watch may not have shown yet.
#[derive(Debug, Default)]
pub(crate) struct Writes {
    last: Option<Last>,
    status: Option<(Status, Instant)>,
}

#[derive(Debug)]
struct Last {
    /// The resourceVersion that we knew then, and what became of it.
    seen: Option<String>,
    now: Option<String>,
}

impl Writes {
    /// The newest status that is known: our own last one, until the watch has shown it.
    pub(crate) fn status<'a>(&'a self, binding: &'a TargetGroupBinding) -> Option<&'a Status> {
        match (&self.last, &self.status) {
            (Some(last), Some((status, _))) if last.seen == binding.metadata.resource_version => Some(status),
            _ => binding.status.as_ref(),
        }
    }

    fn version(&self, binding: &TargetGroupBinding) -> Option<String> {
        let seen = binding.metadata.resource_version.clone();
        match &self.last {
            Some(last) if last.seen == seen => last.now.clone(),
            _ => seen,
        }
    }

    fn wrote(&mut self, binding: &TargetGroupBinding, answer: &TargetGroupBinding) {
        let now = answer.metadata.resource_version.clone();
        self.last = Some(Last { seen: binding.metadata.resource_version.clone(), now });
    }

    /// Sets our finalizer or takes it away. A binding that is gone needs neither.
    ///
    /// # Errors
    /// What the API server answered; a conflict when somebody else wrote.
    pub(crate) async fn set_finalizer(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        wanted: bool,
    ) -> Result<(), kube::Error> {
        let mut finalizers = binding.metadata.finalizers.clone().unwrap_or_default();
        finalizers.retain(|entry| entry != names::FINALIZER);
        if wanted {
            finalizers.push(names::FINALIZER.to_owned());
        }
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": self.version(binding)}});
        match api(ctx, binding).patch(binding.name(), &PatchParams::default(), &Patch::Merge(&patch)).await {
            Ok(answer) => {
                self.wrote(binding, &answer);
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => {
                self.last = None;
                Err(error)
            }
        }
    }

    /// Writes the status if it differs from what is there; `Some` if that must be tried again, and in how long.
    pub(crate) async fn set_status(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        report: &Report,
        generation: Option<i64>,
    ) -> Option<Duration> {
        let old = self.status(binding);
        let new = status::status(report, old, generation, Time(Timestamp::now()));
        let patience = match status::difference(old, &new) {
            status::Difference::None => return None,
            status::Difference::Counts => COUNTS_EVERY,
            status::Difference::Words => WORDS_EVERY,
            status::Difference::Substance => Duration::ZERO,
        };
        let since = self.status.as_ref().map(|(_, at)| at.elapsed());
        if let Some(left) = since.and_then(|since| patience.checked_sub(since)).filter(|left| !left.is_zero())
        {
            return Some(left);
        }
        match self.write_status(ctx, binding, new).await {
            Ok(()) => None,
            Err(kube::Error::Api(status)) if status.is_conflict() => Some(CONFLICT),
            Err(error) => {
                warn!(binding = %format!("{}/{}", binding.namespace(), binding.name()), %error, "could not write the status");
                Some(FAILURE)
            }
        }
    }

    /// Writes the status now, whatever was there. A binding that is gone needs none.
    ///
    /// # Errors
    /// What the API server answered; a conflict when somebody else wrote.
    pub(crate) async fn put_status(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        report: &Report,
        generation: Option<i64>,
    ) -> Result<(), kube::Error> {
        let new = status::status(report, self.status(binding), generation, Time(Timestamp::now()));
        self.write_status(ctx, binding, new).await
    }

    async fn write_status(
        &mut self,
        ctx: &Ctx,
        binding: &TargetGroupBinding,
        new: Status,
    ) -> Result<(), kube::Error> {
        let patch = json!({"metadata": {"resourceVersion": self.version(binding)}, "status": new});
        let answer = api(ctx, binding)
            .patch_status(binding.name(), &PatchParams::default(), &Patch::Merge(&patch))
            .await;
        match answer {
            Ok(answer) => {
                self.wrote(binding, &answer);
                self.status = Some((new, Instant::now()));
                Ok(())
            }
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            Err(error) => {
                if matches!(&error, kube::Error::Api(status) if status.is_conflict()) {
                    self.last = None;
                }
                Err(error)
            }
        }
    }
}

/// Whether a binding has our finalizer.
pub(crate) fn has_finalizer(binding: &TargetGroupBinding) -> bool {
    binding.metadata.finalizers.iter().flatten().any(|entry| entry == names::FINALIZER)
}

fn api(ctx: &Ctx, binding: &TargetGroupBinding) -> Api<TargetGroupBinding> {
    Api::namespaced(ctx.client.clone(), binding.namespace())
}
