//! Admission reviews as JSON: what is asked, and the answers. Nothing here knows what a binding is.

use serde_json::{Map, Value, json};

/// A warning is at most this long; the API server cuts longer ones.
const LONGEST_WARNING: usize = 256;

/// `request` of an AdmissionReview. The `uid` is known whatever else is wrong with it.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    uid: String,
    body: Map<String, Value>,
}

impl Request {
    /// Reads a review.
    ///
    /// # Errors
    /// A sentence, if it is none; that is HTTP 400.
    pub(crate) fn read(body: &[u8]) -> Result<Self, String> {
        let review: Value = serde_json::from_slice(body).map_err(|e| format!("the body is no JSON: {e}"))?;
        if review.get("kind").and_then(Value::as_str) != Some("AdmissionReview")
            || review.get("apiVersion").and_then(Value::as_str) != Some("admission.k8s.io/v1")
        {
            return Err("the body is no AdmissionReview of admission.k8s.io/v1".to_owned());
        }
        let Value::Object(mut review) = review else { return Err("the body is no object".to_owned()) };
        let Some(Value::Object(request)) = review.remove("request") else {
            return Err("the review has no request".to_owned());
        };
        let uid = request.get("uid").and_then(Value::as_str).filter(|uid| !uid.is_empty());
        let uid = uid.ok_or("the request has no uid")?.to_owned();
        Ok(Self { uid, body: request })
    }

    fn text(&self, key: &str) -> &str {
        self.body.get(key).and_then(Value::as_str).unwrap_or_default()
    }

    /// `CREATE`, `UPDATE`, `DELETE`.
    pub(crate) fn operation(&self) -> &str {
        self.text("operation")
    }

    /// The namespace.
    pub(crate) fn namespace(&self) -> &str {
        self.text("namespace")
    }

    /// The name; the object's where the request has none.
    pub(crate) fn name(&self) -> &str {
        match self.text("name") {
            "" => {
                let metadata = self.object().and_then(|o| o.get("metadata"));
                let text =
                    |key| metadata.and_then(|m| m.get(key)).and_then(Value::as_str).unwrap_or_default();
                if text("name").is_empty() { text("generateName") } else { text("name") }
            }
            name => name,
        }
    }

    /// The object; none on DELETE.
    pub(crate) fn object(&self) -> Option<&Value> {
        self.body.get("object").filter(|object| object.is_object())
    }

    /// The stored object; none on CREATE.
    pub(crate) fn old_object(&self) -> Option<&Value> {
        self.body.get("oldObject").filter(|object| object.is_object())
    }

    /// The version in which the user sent it, though it arrives as v1.
    pub(crate) fn user_version(&self) -> &str {
        let kind = self.body.get("requestKind").or_else(|| self.body.get("kind"));
        kind.and_then(|kind| kind.get("version")).and_then(Value::as_str).unwrap_or("v1")
    }
}

/// An answer.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answer {
    /// JSON patch; empty: none.
    pub(crate) patch: Vec<Value>,
    /// Most important first.
    pub(crate) warnings: Vec<String>,
    /// A refusal: `status`.
    pub(crate) refusal: Option<Value>,
}

impl Answer {
    /// The review to send back.
    pub(crate) fn review(self, request: &Request) -> Value {
        use base64::Engine as _;
        let mut response = json!({"uid": request.uid, "allowed": self.refusal.is_none()});
        let Some(members) = response.as_object_mut() else { return Value::Null };
        if !self.warnings.is_empty() {
            let warnings = self.warnings.iter().map(|text| Value::from(shortened(text)));
            members.insert("warnings".into(), warnings.collect());
        }
        if let Some(status) = self.refusal {
            members.insert("status".into(), status);
        } else if !self.patch.is_empty() {
            let patch = Value::Array(self.patch).to_string();
            members.insert("patchType".into(), "JSONPatch".into());
            members.insert("patch".into(), base64::engine::general_purpose::STANDARD.encode(patch).into());
        }
        json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response})
    }
}

/// `422 Invalid` with causes, as (field, message).
pub(crate) fn invalid(group: &str, kind: &str, name: &str, causes: &[(String, String)]) -> Value {
    let all = causes.iter().map(|(_, message)| message.as_str()).collect::<Vec<_>>().join("; ");
    let causes: Vec<Value> = causes
        .iter()
        .map(|(field, message)| {
            let bare = message.strip_prefix(&format!("{field}: ")).unwrap_or(message);
            json!({"reason": "FieldValueInvalid", "field": field, "message": bare})
        })
        .collect();
    json!({
        "status": "Failure",
        "code": 422,
        "reason": "Invalid",
        "message": format!("{kind}.{group} {name:?} is invalid: {all}"),
        "details": {"group": group, "kind": kind, "name": name, "causes": causes}
    })
}

/// `403 Forbidden` with one line each.
pub(crate) fn forbidden(lines: &[String]) -> Value {
    json!({"status": "Failure", "code": 403, "reason": "Forbidden", "message": lines.join("\n")})
}

/// At most 256 characters.
fn shortened(text: &str) -> String {
    if text.chars().count() <= LONGEST_WARNING {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(LONGEST_WARNING - 1).collect();
    short.push('…');
    short
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        let body = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {
            "uid": "u1", "operation": "CREATE", "namespace": "shop", "object": {"metadata": {"generateName": "web-"}},
            "kind": {"version": "v1"}, "requestKind": {"version": "v1beta1"}}});
        Request::read(body.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn a_body_that_is_no_review_is_told_apart() {
        for body in ["", "[]", "{}", r#"{"kind":"AdmissionReview","apiVersion":"admission.k8s.io/v1"}"#] {
            assert!(Request::read(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn the_users_version_and_the_generated_name_are_seen() {
        assert_eq!((request().user_version(), request().name()), ("v1beta1", "web-"));
    }

    #[test]
    fn a_patch_is_base64_and_a_long_warning_is_cut_at_256_characters() {
        let answer =
            Answer { patch: vec![json!({"op": "add"})], warnings: vec!["ü".repeat(300)], refusal: None };
        let response = &answer.review(&request())["response"];
        assert_eq!(response["allowed"], true);
        assert_eq!(response["uid"], "u1");
        assert_eq!(response["patch"], "W3sib3AiOiJhZGQifV0=");
        assert_eq!(response["warnings"][0].as_str().unwrap().chars().count(), 256);
    }

    #[test]
    fn an_invalid_object_is_answered_with_all_causes() {
        let causes = [
            ("spec.a".to_owned(), "spec.a: X1 bad".to_owned()),
            ("spec.b".to_owned(), "spec.b: X2 bad".to_owned()),
        ];
        let status = invalid("g", "K", "n", &causes);
        assert_eq!(
            status["details"]["causes"][1],
            json!({"reason": "FieldValueInvalid", "field": "spec.b", "message": "X2 bad"})
        );
        assert_eq!(status["code"], 422);
    }
}
