//! Events on bindings. Publishing never holds up a pass: it happens on the side, and a failure is only logged.

use crate::reason::EventReason;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tgb_api::v1::TargetGroupBinding;
use tracing::debug;

/// Longest note that the API server takes, bytes.
const LONGEST: usize = 1000;

/// Publishes events; repeated ones become a series.
#[derive(Clone)]
pub(crate) struct Events(Recorder);

impl Events {
    pub(crate) fn new(client: Client) -> Self {
        let reporter =
            Reporter { controller: "tgb-controller".to_owned(), instance: std::env::var("HOSTNAME").ok() };
        Self(Recorder::new(client, reporter))
    }

    /// Something went as it should.
    pub(crate) fn normal(&self, binding: &TargetGroupBinding, reason: EventReason, note: String) {
        self.publish(binding, EventType::Normal, reason, note);
    }

    /// Something that a person may want to look at.
    pub(crate) fn warning(&self, binding: &TargetGroupBinding, reason: EventReason, note: String) {
        self.publish(binding, EventType::Warning, reason, note);
    }

    fn publish(&self, binding: &TargetGroupBinding, kind: EventType, reason: EventReason, note: String) {
        let reference: ObjectReference = binding.object_ref(&());
        let event = Event {
            type_: kind,
            reason: reason.as_str().to_owned(),
            note: Some(shortened(note)),
            action: reason.as_str().to_owned(),
            secondary: None,
        };
        let recorder = self.0.clone();
        tokio::spawn(async move {
            if let Err(error) = recorder.publish(&event, &reference).await {
                debug!(%error, "could not publish an event");
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

/// `2 targets: 10.0.0.1:80, 10.0.0.2:80`, and at most five of them.
pub(crate) fn listed<T: std::fmt::Display>(what: &str, all: &[T]) -> String {
    const MOST: usize = 5;
    let mut first: Vec<String> = all.iter().take(MOST).map(ToString::to_string).collect();
    if all.len() > MOST {
        first.push("…".to_owned());
    }
    format!("{} {what}: {}", all.len(), first.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_and_notes_are_cut_between_characters() {
        assert_eq!(listed("targets", &[1, 2]), "2 targets: 1, 2");
        assert_eq!(listed("targets", &[1, 2, 3, 4, 5, 6]), "6 targets: 1, 2, 3, 4, 5, …");
        assert!(shortened("ü".repeat(600)).len() <= LONGEST + 3);
    }
}
