//! Reviews as the API server sends them. Objects stay text, and only what is needed of them is ever read.
//!
//! They are read here and not where they are answered, since this crate is compiled for speed: most of what a request costs is
//! finding the ends of its objects.

use crate::scan::{Cursor, Unreadable};
use std::borrow::Cow;

/// `kind` of an admission review.
pub const ADMISSION: &str = "AdmissionReview";
/// `apiVersion` of an admission review.
pub const ADMISSION_VERSION: &str = "admission.k8s.io/v1";
/// `kind` of a conversion review.
pub const CONVERSION: &str = "ConversionReview";
/// Objects of one review; API servers send at most a page of a list, and clients get lists of any length.
const MOST_OBJECTS: usize = 200_000;

/// `request` of an AdmissionReview. Objects stay text, so that the `uid` is known whatever is wrong with them, and only
/// what is needed of them is ever read.
#[derive(Debug, Clone, Default)]
pub struct AdmissionRequest<'a> {
    uid: Cow<'a, str>,
    operation: Cow<'a, str>,
    name: Cow<'a, str>,
    namespace: Cow<'a, str>,
    sub_resource: Cow<'a, str>,
    version: Option<Cow<'a, str>>,
    requested_version: Option<Cow<'a, str>>,
    object: Option<&'a str>,
    old_object: Option<&'a str>,
}

/// A body as text.
fn text_of<'a>(body: &'a [u8], kind: &str) -> Result<&'a str, String> {
    std::str::from_utf8(body).map_err(|error| format!("the body is no {kind}: {error}"))
}

fn is_there(value: &str) -> Option<&str> {
    (value != "null").then_some(value)
}

/// `version` of a kind.
fn version<'a>(kind: &mut Cursor<'a>) -> Result<Option<Cow<'a, str>>, Unreadable> {
    let mut version = Cow::default();
    let read = kind.object(|key, value| {
        match key {
            "version" => version = value.string()?,
            _ => value.skip()?,
        }
        Ok(())
    })?;
    Ok(read.map(|()| version))
}

impl<'a> AdmissionRequest<'a> {
    /// Reads a review.
    ///
    /// # Errors
    /// A sentence, if it is none; that is HTTP 400.
    pub fn read(body: &'a [u8]) -> Result<Self, String> {
        let mut cursor = Cursor::of(text_of(body, ADMISSION)?);
        let (mut kind, mut api_version, mut request) = (Cow::default(), Cow::default(), None);
        let read = cursor.object(|key, value| {
            match key {
                "kind" => kind = value.string()?,
                "apiVersion" => api_version = value.string()?,
                "request" => request = Self::of(value)?,
                _ => value.skip()?,
            }
            Ok(())
        });
        read.and_then(|_| cursor.end()).map_err(|error| format!("the body is no {ADMISSION}: {error}"))?;
        if kind != ADMISSION || api_version != ADMISSION_VERSION {
            return Err(format!("the body is no {ADMISSION} of {ADMISSION_VERSION}"));
        }
        let request = request.ok_or("the review has no request")?;
        if request.uid.is_empty() {
            return Err("the request has no uid".to_owned());
        }
        Ok(request)
    }

    fn of(cursor: &mut Cursor<'a>) -> Result<Option<Self>, Unreadable> {
        let mut request = Self::default();
        let read = cursor.object(|key, value| {
            match key {
                "uid" => request.uid = value.string()?,
                "operation" => request.operation = value.string()?,
                "name" => request.name = value.string()?,
                "namespace" => request.namespace = value.string()?,
                "subResource" => request.sub_resource = value.string()?,
                "kind" => request.version = version(value)?,
                "requestKind" => request.requested_version = version(value)?,
                "object" => request.object = is_there(value.value()?),
                "oldObject" => request.old_object = is_there(value.value()?),
                _ => value.skip()?,
            }
            Ok(())
        })?;
        Ok(read.map(|()| request))
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
        self.object
    }

    /// The stored object as JSON; none on CREATE.
    pub fn old_object(&self) -> Option<&'a str> {
        self.old_object
    }

    /// The version in which the user sent it, though it arrives as v1.
    pub fn user_version(&self) -> &str {
        self.requested_version.as_deref().or(self.version.as_deref()).unwrap_or("v1")
    }
}

/// `request` of a ConversionReview.
#[derive(Debug)]
pub struct ConversionRequest<'a> {
    /// The API server's id of it.
    pub uid: Cow<'a, str>,
    /// `group/version` of what is wanted.
    pub desired: Cow<'a, str>,
    /// The text of each object.
    pub objects: Vec<&'a str>,
}

impl<'a> ConversionRequest<'a> {
    /// Reads a review.
    ///
    /// # Errors
    /// A sentence, if it is none; that is HTTP 400.
    pub fn read(body: &'a [u8]) -> Result<Self, String> {
        let mut cursor = Cursor::of(text_of(body, CONVERSION)?);
        let (mut kind, mut uid, mut desired) = (Cow::default(), Cow::default(), Cow::default());
        let (mut request, mut objects) = (None, None);
        let read = cursor.object(|key, value| {
            match key {
                "kind" => kind = value.string()?,
                "request" => {
                    request = value.object(|key, value| {
                        match key {
                            "uid" => uid = value.string()?,
                            "desiredAPIVersion" => desired = value.string()?,
                            "objects" => objects = texts(value)?,
                            _ => value.skip()?,
                        }
                        Ok(())
                    })?;
                }
                _ => value.skip()?,
            }
            Ok(())
        });
        read.and_then(|_| cursor.end()).map_err(|error| format!("the body is no {CONVERSION}: {error}"))?;
        if kind != CONVERSION {
            return Err(format!("the body is no {CONVERSION}"));
        }
        request.ok_or("the review has no request")?;
        let objects = objects.ok_or("the request has no objects")?;
        Ok(Self { uid, desired, objects })
    }
}

/// The text of each item.
fn texts<'a>(cursor: &mut Cursor<'a>) -> Result<Option<Vec<&'a str>>, Unreadable> {
    let mut all = Vec::new();
    let read = cursor.list(|item| {
        if all.len() == MOST_OBJECTS {
            return Err(Unreadable::TooMany(MOST_OBJECTS));
        }
        all.push(item.value()?);
        Ok(())
    })?;
    Ok(read.map(|()| all))
}
