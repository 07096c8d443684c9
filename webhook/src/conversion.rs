//! `/convert`: ConversionReview in, ConversionReview out. Served from the first moment; needs nothing but the request.
//!
//! The API server sends one object per review, one after another, so one review has to be fast: JSON values are moved
//! through, and nothing is parsed into types.

use axum::body::Bytes;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};
use tgb_api::convert::convert_objects_noting;

#[derive(Deserialize)]
struct Review {
    request: Request,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Request {
    uid: String,
    #[serde(rename = "desiredAPIVersion")]
    desired_api_version: String,
    objects: Vec<Value>,
}

/// Answers a review; a body that is none is a bad request.
pub(crate) async fn convert(body: Bytes) -> Response {
    let review: Review = match serde_json::from_slice(&body) {
        Ok(review) => review,
        Err(error) => {
            return (StatusCode::BAD_REQUEST, format!("not a ConversionReview: {error}\n")).into_response();
        }
    };
    drop(body);
    let answer = answer(review.request);
    match serde_json::to_vec(&answer) {
        Ok(bytes) => ([(header::CONTENT_TYPE, "application/json")], bytes).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

fn answer(request: Request) -> Value {
    let mut notes = Vec::new();
    let converted = convert_objects_noting(request.objects, &request.desired_api_version, &mut notes);
    for note in notes {
        tracing::warn!(object = note.object, request_uid = request.uid, "{}", note.text);
    }
    let response = match converted {
        Ok(objects) => {
            json!({"uid": request.uid, "result": {"status": "Success"}, "convertedObjects": objects})
        }
        Err(error) => {
            tracing::warn!(%error, request_uid = request.uid, "conversion refused");
            let result =
                json!({"status": "Failure", "reason": "Invalid", "code": 400, "message": error.to_string()});
            json!({"uid": request.uid, "result": result, "convertedObjects": []})
        }
    };
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "ConversionReview", "response": response})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(desired: &str, objects: Vec<Value>) -> Request {
        Request { uid: "u".to_owned(), desired_api_version: desired.to_owned(), objects }
    }

    #[test]
    fn a_review_keeps_the_order_of_its_objects_and_its_uid() {
        let object = |name: &str| {
            json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": name},
                   "spec": {"targetGroupARN": "a", "serviceRef": {"name": "s", "port": 80}}})
        };
        let answer = answer(request("elbv2.k8s.aws/v1", vec![object("b"), object("a")]));
        assert_eq!(answer["response"]["uid"], "u");
        assert_eq!(answer["response"]["result"]["status"], "Success");
        let names: Vec<&Value> = answer["response"]["convertedObjects"]
            .as_array()
            .unwrap()
            .iter()
            .map(|o| &o["metadata"]["name"])
            .collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(answer["response"]["convertedObjects"][0]["spec"]["targetGroup"]["arn"], "a");
    }

    #[test]
    fn an_unknown_version_fails_the_review_and_names_it() {
        let answer = answer(request("elbv2.k8s.aws/v9", vec![]));
        assert_eq!(answer["response"]["result"]["status"], "Failure");
        assert!(answer["response"]["result"]["message"].as_str().unwrap().contains("v9"));
        assert_eq!(answer["response"]["convertedObjects"], json!([]));
    }
}
