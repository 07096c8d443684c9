//! Reviews as the API server sends them. Objects stay text, and only what is needed of them is ever read.
//!
//! They are read here and not where they are answered, since this crate is compiled for speed: most of what a request costs is
//! finding the ends of its objects.

use serde::Deserialize;
use serde::de::{Deserializer, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

/// `kind` of an admission review.
pub const ADMISSION: &str = "AdmissionReview";
/// `apiVersion` of an admission review.
pub const ADMISSION_VERSION: &str = "admission.k8s.io/v1";
/// `kind` of a conversion review.
pub const CONVERSION: &str = "ConversionReview";
/// Objects of one review; API servers send at most a page of a list, and clients get lists of any length.
const MOST_OBJECTS: usize = 200_000;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct AdmissionReview<'a> {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(borrow)]
    request: Option<AdmissionRequest<'a>>,
}

/// `request` of an AdmissionReview. Objects stay text, so that the `uid` is known whatever is wrong with them, and only
/// what is needed of them is ever read.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdmissionRequest<'a> {
    #[serde(default)]
    uid: String,
    #[serde(default)]
    operation: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    sub_resource: String,
    kind: Option<Kind>,
    request_kind: Option<Kind>,
    #[serde(borrow)]
    object: Option<&'a RawValue>,
    #[serde(borrow)]
    old_object: Option<&'a RawValue>,
}

#[derive(Debug, Clone, Deserialize)]
struct Kind {
    #[serde(default)]
    version: String,
}

impl<'a> AdmissionRequest<'a> {
    /// Reads a review.
    ///
    /// # Errors
    /// A sentence, if it is none; that is HTTP 400.
    pub fn read(body: &'a [u8]) -> Result<Self, String> {
        let review: AdmissionReview<'a> =
            serde_json::from_slice(body).map_err(|e| format!("the body is no {ADMISSION}: {e}"))?;
        if review.kind != ADMISSION || review.api_version != ADMISSION_VERSION {
            return Err(format!("the body is no {ADMISSION} of {ADMISSION_VERSION}"));
        }
        let request = review.request.ok_or("the review has no request")?;
        if request.uid.is_empty() {
            return Err("the request has no uid".to_owned());
        }
        Ok(request)
    }

    /// The API server's id of this request.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// `CREATE`, `UPDATE`, `DELETE`.
    pub fn operation(&self) -> &str {
        &self.operation
    }

    /// Whether it is about a part of the object, such as its status.
    pub fn is_of_subresource(&self) -> bool {
        !self.sub_resource.is_empty()
    }

    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name; empty while a name is to be generated.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The object as JSON; none on DELETE.
    pub fn object(&self) -> Option<&'a str> {
        self.object.map(RawValue::get)
    }

    /// The stored object as JSON; none on CREATE.
    pub fn old_object(&self) -> Option<&'a str> {
        self.old_object.map(RawValue::get)
    }

    /// The version in which the user sent it, though it arrives as v1.
    pub fn user_version(&self) -> &str {
        let kind = self.request_kind.as_ref().or(self.kind.as_ref());
        kind.map_or("v1", |kind| kind.version.as_str())
    }
}

#[derive(Deserialize)]
struct ConversionReview<'a> {
    #[serde(default)]
    kind: String,
    #[serde(borrow)]
    request: Option<Conversion<'a>>,
}

#[derive(Deserialize)]
struct Conversion<'a> {
    #[serde(default)]
    uid: String,
    #[serde(default, rename = "desiredAPIVersion")]
    desired: String,
    #[serde(borrow)]
    objects: Option<Objects<'a>>,
}

/// `request` of a ConversionReview.
#[derive(Debug)]
pub struct ConversionRequest<'a> {
    /// The API server's id of it.
    pub uid: String,
    /// `group/version` of what is wanted.
    pub desired: String,
    /// The text of each object.
    pub objects: Vec<&'a RawValue>,
}

impl<'a> ConversionRequest<'a> {
    /// Reads a review.
    ///
    /// # Errors
    /// A sentence, if it is none; that is HTTP 400.
    pub fn read(body: &'a [u8]) -> Result<Self, String> {
        let review: ConversionReview<'a> =
            serde_json::from_slice(body).map_err(|error| format!("the body is no {CONVERSION}: {error}"))?;
        if review.kind != CONVERSION {
            return Err(format!("the body is no {CONVERSION}"));
        }
        let Conversion { uid, desired, objects } = review.request.ok_or("the review has no request")?;
        let objects = objects.ok_or("the request has no objects")?.0;
        Ok(Self { uid, desired, objects })
    }
}

/// The text of each object.
struct Objects<'a>(Vec<&'a RawValue>);

impl<'de: 'a, 'a> Deserialize<'de> for Objects<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Objects<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of objects")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
                let mut all = Vec::new();
                while let Some(item) = items.next_element::<&'de RawValue>()? {
                    if all.len() == MOST_OBJECTS {
                        return Err(serde::de::Error::custom(format!("more than {MOST_OBJECTS} objects")));
                    }
                    all.push(item);
                }
                Ok(Objects(all))
            }
        }
        deserializer.deserialize_seq(Reader)
    }
}
