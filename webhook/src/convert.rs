//! `/convert`: ConversionReviews, all or nothing.
//!
//! Objects are read, converted and written one after the other, so that a list takes little more memory than its own text and
//! the answer's. Of a very long one the answer is never there as a whole: it is converted twice, first to know that all of it can
//! be, then piece by piece as the client takes it.

use crate::serve::aside;
use axum::body::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use serde::Serialize;
use std::pin::Pin;
use std::task::{Context, Poll};
use tgb_api::convert::convert_text;
use tgb_api::crd::Version;
use tgb_api::review::{CONVERSION, ConversionRequest};
use tgb_process::server::Held;

const API_VERSION: &str = "apiextensions.k8s.io/v1";
/// Bytes of one object: more than an API server takes (3 MiB).
const MOST_BYTES: usize = 8 << 20;
/// Bytes of a review that is answered as a whole.
const WHOLE: usize = 16 << 20;
/// Bytes of a piece.
const PIECE: usize = 64 << 10;

/// Bytes that a review of so many takes, with its answer.
pub(crate) fn cost(body: usize) -> usize {
    if body <= WHOLE { body.saturating_mul(9) / 4 } else { body.saturating_add(8 << 20) }
}

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

/// The answer of a review, as JSON.
pub(crate) enum Answered {
    /// All of it.
    Whole(Vec<u8>),
    /// The way to make it.
    Pieces(Pieces),
}

impl Answered {
    /// The body of the response, which takes the memory that is held.
    pub(crate) fn with(self, held: Held) -> axum::body::Body {
        match self {
            Self::Whole(bytes) => held.keep(bytes).into(),
            Self::Pieces(pieces) => axum::body::Body::new(Pieces { _held: held, ..pieces }),
        }
    }
}

/// An answer that is made as it is taken.
pub(crate) struct Pieces {
    /// The text before the objects, until it is written.
    head: Vec<u8>,
    /// The rest of them, in the version that they have.
    objects: std::vec::IntoIter<Bytes>,
    to: Version,
    is_first: bool,
    tail: Vec<u8>,
    /// Bytes that are not written.
    left: usize,
    _held: Held,
}

impl Pieces {
    /// The next piece; an empty one is the end.
    fn piece(&mut self) -> Result<Vec<u8>, std::io::Error> {
        let mut out = std::mem::take(&mut self.head);
        while out.len() < PIECE {
            let Some(object) = self.objects.next() else {
                out.append(&mut self.tail);
                break;
            };
            if !std::mem::take(&mut self.is_first) {
                out.push(b',');
            }
            let text = std::str::from_utf8(&object).map_err(std::io::Error::other)?;
            // All of them were converted once.
            aside(text.len(), || convert_text(text, self.to, &mut out)).map_err(std::io::Error::other)?;
        }
        self.left = self.left.saturating_sub(out.len());
        Ok(out)
    }
}

impl Body for Pieces {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        let piece = self.piece().map(|piece| (!piece.is_empty()).then(|| Frame::data(Bytes::from(piece))));
        Poll::Ready(piece.transpose())
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(u64::try_from(self.left).unwrap_or(u64::MAX))
    }
}

/// Answers a review.
///
/// # Errors
/// A sentence, if the body is no review; that is HTTP 400.
pub(crate) fn review(body: &Bytes) -> Result<(Answered, Converted), String> {
    review_within(body, WHOLE)
}

fn review_within(body: &Bytes, whole: usize) -> Result<(Answered, Converted), String> {
    let ConversionRequest { uid, desired, objects } = ConversionRequest::read(body)?;
    let (uid, to) = (&*uid, &*desired);
    let _span = tracing::debug_span!("conversion", uid, to, objects = objects.len()).entered();
    let quoted = serde_json::to_string(uid).map_err(|error| error.to_string())?;

    let is_whole = body.len() <= whole;
    let mut out = Vec::with_capacity(if is_whole { body.len() + body.len() / 8 + 256 } else { PIECE });
    out.extend_from_slice(
        format!(
            r#"{{"apiVersion":"{API_VERSION}","kind":"{CONVERSION}","response":{{"uid":{quoted},"convertedObjects":["#
        )
        .as_bytes(),
    );
    let begun = out.len();
    let mut counts = Converted::default();
    let mut dropped = 0;
    let each = |out: &mut Vec<u8>| {
        if !is_whole {
            dropped += out.len() - begun;
            out.truncate(begun);
        }
    };
    let converted = convert_all(&objects, to, &mut out, &mut counts, each);
    let outcome = match &converted {
        Ok(_) => Outcome { status: "Success", reason: None, code: None, message: "" },
        Err(message) => {
            tracing::error!(error = message, uid, to, "a conversion failed");
            out.truncate(begun);
            Outcome { status: "Failure", reason: Some("BadRequest"), code: Some(400), message }
        }
    };
    let mut tail = br#"],"result":"#.to_vec();
    serde_json::to_writer(&mut tail, &outcome).map_err(|error| error.to_string())?;
    tail.extend_from_slice(b"}}");
    let answered = match converted {
        Ok(to) if !is_whole => Answered::Pieces(Pieces {
            left: begun + dropped + tail.len(),
            head: out,
            objects: objects
                .iter()
                .map(|text| body.slice_ref(text.as_bytes()))
                .collect::<Vec<_>>()
                .into_iter(),
            to,
            is_first: true,
            tail,
            _held: Held::default(),
        }),
        _ => {
            out.append(&mut tail);
            Answered::Whole(out)
        }
    };
    Ok((answered, counts))
}

/// Converts all, and calls `each` after each; the version is the one that they have then.
fn convert_all(
    objects: &[&str],
    desired: &str,
    out: &mut Vec<u8>,
    counts: &mut Converted,
    mut each: impl FnMut(&mut Vec<u8>),
) -> Result<Version, String> {
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
        each(out);
    }
    Ok(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn answer(objects: Value, desired: &str) -> Value {
        let body = json!({"apiVersion": API_VERSION, "kind": CONVERSION,
            "request": {"uid": "u1", "desiredAPIVersion": desired, "objects": objects}});
        let body = Bytes::from(body.to_string());
        let whole = bytes(review(&body).unwrap().0);
        assert_eq!(whole, bytes(review_within(&body, 0).unwrap().0), "in pieces it is the same");
        serde_json::from_slice(&whole).unwrap()
    }

    /// All of an answer, which is as long as it says.
    fn bytes(answered: Answered) -> Vec<u8> {
        let mut pieces = match answered {
            Answered::Whole(bytes) => return bytes,
            Answered::Pieces(pieces) => pieces,
        };
        let (length, mut all) = (pieces.left, Vec::new());
        loop {
            let piece = pieces.piece().unwrap();
            assert!(piece.len() < 2 * PIECE);
            if piece.is_empty() {
                assert_eq!((all.len(), pieces.left), (length, 0));
                return all;
            }
            all.extend(piece);
        }
    }

    #[test]
    fn a_very_long_review_is_answered_in_pieces() {
        let objects: Vec<_> = (0..2_000).map(|n| beta(&format!("b{n}"))).collect();
        let response = &answer(json!(objects), "elbv2.k8s.aws/v1")["response"];
        let converted = response["convertedObjects"].as_array().unwrap();
        assert_eq!((converted.len(), &converted[1_999]["metadata"]["name"]), (2_000, &json!("b1999")));
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
        let failed = bytes(review(&Bytes::from(objects)).unwrap().0);
        let failed: Value = serde_json::from_slice(&failed).unwrap();
        assert_eq!(failed["response"]["result"]["status"], "Failure");
        let many =
            format!(r#"{{"kind":"ConversionReview","request":{{"objects":[{}0]}}}}"#, "0,".repeat(200_000));
        for body in ["", "{}", "[]", &deep, &many, r#"{"kind":"ConversionReview","request":{}}"#] {
            assert!(review(&Bytes::copy_from_slice(body.as_bytes())).is_err());
        }
    }
}
