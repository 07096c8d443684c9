//! Events on bindings. Publishing never holds up a pass: it happens on the side, and a failure is only logged.

use crate::reason::EventReason;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tgb_api::v1::TargetGroupBinding;
use tokio::sync::Semaphore;
use tracing::debug;

/// Longest note that the API server takes, bytes.
const LONGEST: usize = 1000;
/// Events that wait for the API server at the same time. As many more as come while it is away are not sent.
const MOST: usize = 1000;

/// Publishes events; repeated ones become a series. The recorder takes events about the same reason for repetitions
/// whatever they say, so there is one for each note.
#[derive(Clone)]
pub(crate) struct Events {
    client: Client,
    reporter: Reporter,
    places: Arc<Semaphore>,
    last: Arc<Mutex<HashMap<(String, EventReason), Last>>>,
}

/// The last note about a binding for a reason, and who published it.
struct Last {
    note: String,
    recorder: Recorder,
}

impl Events {
    pub(crate) fn new(client: Client) -> Self {
        let reporter =
            Reporter { controller: "tgb-controller".to_owned(), instance: std::env::var("HOSTNAME").ok() };
        Self { client, reporter, places: Arc::new(Semaphore::new(MOST)), last: Arc::default() }
    }

    /// Something went as it should.
    pub(crate) fn normal(&self, binding: &TargetGroupBinding, reason: EventReason, note: String) {
        self.publish(binding, EventType::Normal, reason, note);
    }

    /// Something that a person may want to look at.
    pub(crate) fn warning(&self, binding: &TargetGroupBinding, reason: EventReason, note: String) {
        self.publish(binding, EventType::Warning, reason, note);
    }

    /// Forgets what was said of a binding that is gone.
    pub(crate) fn forget(&self, uid: &str) {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).retain(|(of, _), _| of != uid);
    }

    fn publish(&self, binding: &TargetGroupBinding, kind: EventType, reason: EventReason, note: String) {
        let Ok(place) = Arc::clone(&self.places).try_acquire_owned() else {
            debug!(note, "an event is left out, since the API server does not take those before");
            return;
        };
        let note = shortened(note);
        let reference: ObjectReference = binding.object_ref(&());
        let recorder = {
            let key = (binding.metadata.uid.clone().unwrap_or_default(), reason);
            let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
            let fresh = || Last {
                note: note.clone(),
                recorder: Recorder::new(self.client.clone(), self.reporter.clone()),
            };
            let of_reason = last.entry(key).or_insert_with(fresh);
            if of_reason.note != note {
                *of_reason = fresh();
            }
            of_reason.recorder.clone()
        };
        let event = Event {
            type_: kind,
            reason: reason.as_str().to_owned(),
            note: Some(note),
            action: reason.as_str().to_owned(),
            secondary: None,
        };
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = recorder.publish(&event, &reference).await {
                debug!(error = %tgb_process::told(&error), "could not publish an event");
            }
        });
    }
}

fn shortened(mut note: String) -> String {
    if note.len() > LONGEST {
        let mut end = LONGEST;
        while !note.is_char_boundary(end) {
            end -= 1;
        }
        note.truncate(end);
        note.push('…');
    }
    note
}

/// `1 target`, `2 targets`.
pub(crate) fn counted(count: usize, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// `2 targets: 10.0.0.1:80, 10.0.0.2:80`, and at most five of them.
pub(crate) fn listed<T: std::fmt::Display>(what: &str, all: &[T]) -> String {
    format!("{}: {}", counted(all.len(), what), first_few(all))
}

/// Entries of a list that are shown.
pub(crate) const LISTED: usize = 5;

/// The first five of a list.
pub(crate) fn first_few<T: std::fmt::Display>(all: &[T]) -> String {
    let mut first: Vec<String> = all.iter().take(LISTED).map(ToString::to_string).collect();
    if all.len() > LISTED {
        first.push("…".to_owned());
    }
    first.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_and_notes_are_cut_between_characters() {
        assert_eq!(listed("target", &[1, 2]), "2 targets: 1, 2");
        assert_eq!(listed("target", &[1]), "1 target: 1");
        assert_eq!(listed("target", &[1, 2, 3, 4, 5, 6]), "6 targets: 1, 2, 3, 4, 5, …");
        assert!(shortened("ü".repeat(600)).len() <= LONGEST + 3);
    }

    #[tokio::test]
    async fn events_that_the_api_server_does_not_take_are_bounded() {
        let silent = tower::service_fn(|_: http::Request<kube::client::Body>| {
            std::future::pending::<Result<http::Response<kube::client::Body>, tower::BoxError>>()
        });
        let events = Events::new(Client::new(silent, "default"));
        for n in 0..3 * MOST {
            events.warning(&TargetGroupBinding::default(), EventReason::ReconcileFailed, n.to_string());
        }
        assert_eq!(events.places.available_permits(), 0);
        let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
        // The client has one, too.
        assert!(tasks <= MOST + 1, "{tasks} tasks");
    }
}
