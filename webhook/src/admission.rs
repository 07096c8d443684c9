//! The answers to admission reviews, as JSON. Nothing here knows what a binding is.

use serde::Serialize;
use serde_json::Value;
use std::borrow::Cow;
use tgb_api::review::{ADMISSION, ADMISSION_VERSION};
pub(crate) use tgb_api::review::{AdmissionRequest as Request, Objects};

/// A warning is at most this long; the API server cuts longer ones.
const LONGEST_WARNING: usize = 256;

/// An answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    /// JSON patch; empty: none.
    pub(crate) patch: Vec<Value>,
    /// Most important first.
    pub(crate) warnings: Vec<String>,
    /// A refusal: `status`.
    pub(crate) refusal: Option<Status>,
    /// The id of the rule that refuses, or nothing.
    pub(crate) rule: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Reply<'a> {
    api_version: &'static str,
    kind: &'static str,
    response: Response<'a>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Response<'a> {
    uid: &'a str,
    allowed: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<Status>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch_type: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    patch: Option<String>,
}

impl Answer {
    /// The review to send back, as JSON.
    ///
    /// # Errors
    /// Never with what is put into it here.
    pub(crate) fn review(self, request: &Request<'_>) -> Result<Vec<u8>, String> {
        use base64::Engine as _;
        let allowed = self.refusal.is_none();
        let patch = (allowed && !self.patch.is_empty()).then(|| {
            let patch = Value::Array(self.patch).to_string();
            base64::engine::general_purpose::STANDARD.encode(patch)
        });
        let response = Response {
            uid: request.uid(),
            allowed,
            status: self.refusal,
            warnings: self.warnings.iter().map(|text| shortened(text)).collect(),
            patch_type: patch.is_some().then_some("JSONPatch"),
            patch,
        };
        let reply = Reply { api_version: ADMISSION_VERSION, kind: ADMISSION, response };
        serde_json::to_vec(&reply).map_err(|error| error.to_string())
    }
}

/// `status` of a refusal, as Kubernetes writes it.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Status {
    status: &'static str,
    code: u16,
    reason: &'static str,
    message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Details>,
}

#[derive(Debug, Clone, Serialize)]
struct Details {
    group: &'static str,
    kind: &'static str,
    name: String,
    causes: Vec<Cause>,
}

/// One thing that is wrong.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cause {
    reason: &'static str,
    field: String,
    message: String,
}

impl Cause {
    /// What is wrong with a field.
    pub(crate) fn new(field: String, message: String) -> Self {
        Self { reason: "FieldValueInvalid", field, message }
    }
}

/// `422 Invalid` with causes.
pub(crate) fn invalid(group: &'static str, kind: &'static str, name: &str, causes: Vec<Cause>) -> Status {
    let all = causes.iter().map(|cause| format!("{}: {}", cause.field, cause.message));
    let message = format!("{kind}.{group} {name:?} is invalid: {}", all.collect::<Vec<_>>().join("; "));
    let details = Some(Details { group, kind, name: name.to_owned(), causes });
    Status { status: "Failure", code: 422, reason: "Invalid", message, details }
}

/// `403 Forbidden` with one line each.
pub(crate) fn forbidden(lines: &[String]) -> Status {
    Status { status: "Failure", code: 403, reason: "Forbidden", message: lines.join("\n"), details: None }
}

/// At most 256 characters.
fn shortened(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST_WARNING || text.chars().count() <= LONGEST_WARNING {
        return text.into();
    }
    let mut short: String = text.chars().take(LONGEST_WARNING - 1).collect();
    short.push('…');
    short.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn body() -> String {
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u1", "operation": "CREATE", "namespace": "shop", "object": {"metadata": {"generateName": "web-"}},
            "oldObject": null, "kind": {"version": "v1"}, "requestKind": {"version": "v1beta1"}}})
        .to_string()
    }

    fn answered(answer: Answer) -> Value {
        let body = body();
        let reply = answer.review(&Request::read(body.as_bytes()).unwrap().0).unwrap();
        serde_json::from_slice::<Value>(&reply).unwrap()["response"].take()
    }

    #[test]
    fn a_body_that_is_no_review_is_told_apart() {
        let deep = format!("{}{}", "[".repeat(1 << 16), "]".repeat(1 << 16));
        let review = r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}"#;
        let nameless = body().replace("\"u1\"", "\"\"");
        for body in ["", "[]", "{}", "null", review, &nameless, &deep, "\u{0}", &body()[1..]] {
            assert!(Request::read(body.as_bytes()).is_err(), "{body:.80}");
        }
        assert!(Request::read(b"{\"kind\":\"\xff\"}").is_err());
    }

    #[test]
    fn nesting_inside_of_an_object_is_no_matter() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let body = body().replace("\"web-\"", &deep);
        assert_eq!(Request::read(body.as_bytes()).unwrap().0.uid(), "u1");
        let (request, objects) = Request::read_bindings(body.as_bytes()).unwrap();
        assert!(request.uid() == "u1" && objects.new.is_some_and(|sent| sent.is_err()));
    }

    #[test]
    fn the_users_version_is_seen_and_null_is_nothing() {
        let body = body();
        let (request, objects) = Request::read(body.as_bytes()).unwrap();
        assert_eq!((request.user_version(), request.name(), objects.old), ("v1beta1", "", None));
        assert!(Request::read_bindings(body.as_bytes()).unwrap().1.old.is_none());
    }

    #[test]
    fn a_patch_is_base64_and_a_long_warning_is_cut_at_256_characters() {
        let answer = Answer {
            patch: vec![json!({"op": "add"})],
            warnings: vec!["ü".repeat(300)],
            ..Answer::default()
        };
        let response = answered(answer);
        assert_eq!(response["allowed"], true);
        assert_eq!(response["uid"], "u1");
        assert_eq!(response["patchType"], "JSONPatch");
        assert_eq!(response["patch"], "W3sib3AiOiJhZGQifV0=");
        assert_eq!(response["warnings"][0].as_str().unwrap().chars().count(), 256);
        assert_eq!(answered(Answer::default()), json!({"uid": "u1", "allowed": true}));
    }

    #[test]
    fn an_invalid_object_is_answered_with_all_causes() {
        let cause = |field: &str, message: &str| Cause::new(field.to_owned(), message.to_owned());
        let causes = vec![cause("spec.a", "X1 bad"), cause("spec.b", "X2 bad")];
        let refusal = Some(invalid("g", "K", "n", causes));
        let response = answered(Answer { refusal, ..Answer::default() });
        assert_eq!(response["allowed"], false);
        let status = &response["status"];
        assert_eq!(
            status["details"]["causes"][1],
            json!({"reason": "FieldValueInvalid", "field": "spec.b", "message": "X2 bad"})
        );
        assert_eq!(status["code"], 422);
        assert_eq!(status["message"], "K.g \"n\" is invalid: spec.a: X1 bad; spec.b: X2 bad");
    }
}
