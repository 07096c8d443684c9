//! `/convert`: ConversionReviews, all or nothing.
//!
//! Objects are read, converted and written one after the other, so that a long list takes little more memory than its
//! own text.

use serde::Serialize;
use tgb_api::convert::convert_text;
use tgb_api::crd::Version;
use tgb_api::review::{CONVERSION, ConversionRequest};

const API_VERSION: &str = "apiextensions.k8s.io/v1";
/// Bytes of one object: more than an API server takes (3 MiB).
const MOST_BYTES: usize = 8 << 20;

#[derive(Serialize)]
struct Outcome<'a> {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<u16>,
    #[serde(skip_serializing_if = "str::is_empty")]
    message: &'a str,
}

/// What was converted: how many objects from each version, to one.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Converted {
    /// As [`Version::ALL`].
    from: [u64; Version::ALL.len()],
    to: Option<Version>,
}

impl Converted {
    /// From, to, and how many.
    pub(crate) fn pairs(&self) -> impl Iterator<Item = (Version, Version, u64)> {
        let pairs = Version::ALL.into_iter().zip(self.from).filter(|(_, count)| *count > 0);
        self.to.into_iter().flat_map(move |to| pairs.clone().map(move |(from, count)| (from, to, count)))
    }

    fn count(&mut self, version: Version) {
        for (known, count) in Version::ALL.into_iter().zip(&mut self.from) {
            *count += u64::from(known == version);
        }
    }
}

/// Answers a review, as JSON.
///
/// # Errors
/// A sentence, if the body is no review; that is HTTP 400.
pub(crate) fn review(body: &[u8]) -> Result<(Vec<u8>, Converted), String> {
    let ConversionRequest { uid, desired, objects } = ConversionRequest::read(body)?;
    let (uid, to) = (&*uid, &*desired);
    let _span = tracing::debug_span!("conversion", uid, to, objects = objects.len()).entered();
    let quoted = serde_json::to_string(uid).map_err(|error| error.to_string())?;

    let mut out = Vec::with_capacity(body.len() + body.len() / 8 + 256);
    out.extend_from_slice(
        format!(
            r#"{{"apiVersion":"{API_VERSION}","kind":"{CONVERSION}","response":{{"uid":{quoted},"convertedObjects":["#
        )
        .as_bytes(),
    );
    let begun = out.len();
    let mut counts = Converted::default();
    let converted = convert_all(&objects, to, &mut out, &mut counts);
    let outcome = match &converted {
        Ok(()) => Outcome { status: "Success", reason: None, code: None, message: "" },
        Err(message) => {
            tracing::error!(error = message, uid, to, "a conversion failed");
            out.truncate(begun);
            Outcome { status: "Failure", reason: Some("BadRequest"), code: Some(400), message }
        }
    };
    out.extend_from_slice(br#"],"result":"#);
    serde_json::to_writer(&mut out, &outcome).map_err(|error| error.to_string())?;
    out.extend_from_slice(b"}}");
    Ok((out, counts))
}

fn convert_all(
    objects: &[&str],
    desired: &str,
    out: &mut Vec<u8>,
    counts: &mut Converted,
) -> Result<(), String> {
    let to = Version::of_api_version(desired)
        .ok_or_else(|| tgb_api::convert::ConvertError::UnknownVersion(desired.to_owned()).to_string())?;
    counts.to = Some(to);
    for (n, text) in objects.iter().enumerate() {
        if text.len() > MOST_BYTES {
            return Err(format!("object {n} has {} bytes; at most {MOST_BYTES} are converted", text.len()));
        }
        if n > 0 {
            out.push(b',');
        }
        let from = convert_text(text, to, out).map_err(|error| format!("object {n}: {error}"))?;
        counts.count(from);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn answer(objects: Value, desired: &str) -> Value {
        let body = json!({"apiVersion": API_VERSION, "kind": CONVERSION,
            "request": {"uid": "u1", "desiredAPIVersion": desired, "objects": objects}});
        serde_json::from_slice(&review(body.to_string().as_bytes()).unwrap().0).unwrap()
    }

    fn beta(name: &str) -> Value {
        json!({"apiVersion": "elbv2.k8s.aws/v1beta1", "kind": "TargetGroupBinding", "metadata": {"name": name},
            "spec": {"targetGroupName": "web", "serviceRef": {"name": "web", "port": 80}}})
    }

    #[test]
    fn objects_come_back_in_the_desired_version_and_in_their_order() {
        let answer = answer(json!([beta("b"), beta("a")]), "elbv2.k8s.aws/v1");
        assert_eq!((&answer["kind"], &answer["apiVersion"]), (&json!(CONVERSION), &json!(API_VERSION)));
        let response = &answer["response"];
        assert_eq!((&response["uid"], &response["result"]), (&json!("u1"), &json!({"status": "Success"})));
        let objects = response["convertedObjects"].as_array().unwrap();
        let names: Vec<_> = objects.iter().map(|object| &object["metadata"]["name"]).collect();
        assert_eq!(names, ["b", "a"]);
        assert_eq!(objects[0]["spec"]["targetGroup"]["name"], "web");
    }

    #[test]
    fn an_empty_review_is_a_success_of_nothing() {
        let response = &answer(json!([]), "elbv2.k8s.aws/v1")["response"];
        assert_eq!(
            (&response["convertedObjects"], &response["result"]["status"]),
            (&json!([]), &json!("Success"))
        );
    }

    #[test]
    fn one_bad_object_fails_all_and_is_named() {
        let mut pod = beta("b");
        pod["kind"] = json!("Pod");
        for (objects, desired, part) in [
            (json!([]), "elbv2.k8s.aws/v9", "v9"),
            (json!([beta("a"), pod]), "elbv2.k8s.aws/v1", "Pod"),
            (json!([beta("a"), 3]), "elbv2.k8s.aws/v1", "not a JSON object"),
        ] {
            let response = answer(objects, desired)["response"].take();
            assert_eq!((&response["uid"], &response["convertedObjects"]), (&json!("u1"), &json!([])));
            assert_eq!(response["result"]["status"], "Failure");
            assert!(response["result"]["message"].as_str().unwrap().contains(part), "{response}");
        }
    }

    #[test]
    fn what_is_no_review_is_told_apart_and_depth_is_no_danger() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        let objects = format!(
            r#"{{"kind":"ConversionReview","request":{{"uid":"u","desiredAPIVersion":"elbv2.k8s.aws/v1","objects":[{deep}]}}}}"#
        );
        let failed: Value = serde_json::from_slice(&review(objects.as_bytes()).unwrap().0).unwrap();
        assert_eq!(failed["response"]["result"]["status"], "Failure");
        let many =
            format!(r#"{{"kind":"ConversionReview","request":{{"objects":[{}0]}}}}"#, "0,".repeat(200_000));
        for body in ["", "{}", "[]", &deep, &many, r#"{"kind":"ConversionReview","request":{}}"#] {
            assert!(review(body.as_bytes()).is_err());
        }
    }
}
