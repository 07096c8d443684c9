//! `/convert`: ConversionReviews, all or nothing.

use serde_json::{Value, json};
use tgb_api::convert::convert_objects_noting;

/// Answers a review.
///
/// # Errors
/// A sentence, if the body is no review; that is HTTP 400.
pub(crate) fn review(body: &[u8]) -> Result<Value, String> {
    let mut review: Value = serde_json::from_slice(body).map_err(|e| format!("the body is no JSON: {e}"))?;
    if review.get("kind").and_then(Value::as_str) != Some("ConversionReview") {
        return Err("the body is no ConversionReview".to_owned());
    }
    let Some(request) = review.get_mut("request").and_then(Value::as_object_mut) else {
        return Err("the review has no request".to_owned());
    };
    let uid = request.get("uid").cloned().unwrap_or_default();
    let desired = request.get("desiredAPIVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    let Some(Value::Array(objects)) = request.remove("objects") else {
        return Err("the request has no objects".to_owned());
    };
    let mut notes = Vec::new();
    let response = match convert_objects_noting(objects, &desired, &mut notes) {
        Ok(objects) => json!({"uid": uid, "result": {"status": "Success"}, "convertedObjects": objects}),
        Err(error) => {
            tracing::error!(%error, "a conversion failed");
            json!({"uid": uid, "convertedObjects": [],
                "result": {"status": "Failure", "reason": "BadRequest", "code": 400, "message": error.to_string()}})
        }
    };
    for note in notes {
        tracing::warn!(object = note.object, "a conversion dropped something: {}", note.text);
    }
    Ok(json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview", "response": response}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(objects: Value, desired: &str) -> Vec<u8> {
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview",
            "request": {"uid": "u1", "desiredAPIVersion": desired, "objects": objects}})
        .to_string()
        .into_bytes()
    }

    #[test]
    fn objects_come_back_in_the_desired_version() {
        let object = json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": "web"},
            "spec": {"targetGroupName": "web", "serviceRef": {"name": "web", "port": 80}}});
        let answer = review(&body(json!([object]), "elbv2.k8s.aws/v1")).unwrap();
        assert_eq!(answer["response"]["uid"], "u1");
        assert_eq!(answer["response"]["convertedObjects"][0]["spec"]["targetGroup"]["name"], "web");
    }

    #[test]
    fn an_unknown_version_is_a_failure_that_names_it() {
        let answer = review(&body(json!([]), "elbv2.k8s.aws/v9")).unwrap();
        assert_eq!(answer["response"]["result"]["status"], "Failure");
        assert!(answer["response"]["result"]["message"].as_str().unwrap().contains("v9"));
    }
}
