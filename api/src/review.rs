//! Reviews as the API server sends them, of which only what is needed is ever read.
//!
//! They are read here and not where they are answered, since this crate is compiled for speed: most of what a request costs is
//! going through its objects.

use crate::scan::{Cursor, Unreadable};
use crate::text::{is_dns_label, quoted};
use crate::v1::{Parents, TargetGroupBinding};
use std::borrow::Cow;

/// `kind` of an admission review.
pub const ADMISSION: &str = "AdmissionReview";
/// `apiVersion` of an admission review.
pub const ADMISSION_VERSION: &str = "admission.k8s.io/v1";
/// `kind` of a conversion review.
pub const CONVERSION: &str = "ConversionReview";
/// Objects of one review; API servers send at most a page of a list, and clients get lists of any length.
const MOST_OBJECTS: usize = 200_000;

/// `request` of an AdmissionReview without its objects. The `uid` is known whatever is wrong with these.
#[derive(Debug, Clone, Default)]
pub struct AdmissionRequest<'a> {
    uid: Cow<'a, str>,
    operation: Cow<'a, str>,
    name: Cow<'a, str>,
    namespace: Cow<'a, str>,
    sub_resource: Cow<'a, str>,
    version: Option<Cow<'a, str>>,
    requested_version: Option<Cow<'a, str>>,
}

/// The objects of an AdmissionReview, as far as they are read.
#[derive(Debug, Clone)]
pub struct Objects<O> {
    /// As it is to be; none on DELETE.
    pub new: Option<O>,
    /// As it is stored; none on CREATE.
    pub old: Option<O>,
}

/// A binding as a review has it, and which of its parts are there; or why it can't be read.
pub type Sent = Result<(TargetGroupBinding, Parents), Unreadable>;

/// A body as text.
fn text_of<'a>(body: &'a [u8], kind: &str) -> Result<&'a str, String> {
    std::str::from_utf8(body).map_err(|error| format!("the body is no {kind}: {error}"))
}

/// `version` of a kind.
fn version<'a>(kind: &mut Cursor<'a>) -> Result<Option<Cow<'a, str>>, Unreadable> {
    Ok(kind.member("version", Cursor::string)?.map(Option::unwrap_or_default))
}

impl<'a> AdmissionRequest<'a> {
    /// Reads a review, whose objects stay text.
    ///
    /// # Errors
    /// A sentence, if it is none; that is HTTP 400.
    pub fn read(body: &'a [u8]) -> Result<(Self, Objects<&'a str>), String> {
        Self::read_by(body, Cursor::value)
    }

    /// Reads a review of bindings, these on the way.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_bindings(body: &'a [u8]) -> Result<(Self, Objects<Sent>), String> {
        Self::read_by(body, |object| {
            let mut reading = object.clone();
            let read = TargetGroupBinding::of_review(&mut reading);
            match read {
                Ok(_) => *object = reading,
                Err(_) => object.skip()?,
            }
            Ok(read)
        })
    }

    fn read_by<O>(
        body: &'a [u8],
        mut take: impl FnMut(&mut Cursor<'a>) -> Result<O, Unreadable>,
    ) -> Result<(Self, Objects<O>), String> {
        let mut cursor = Cursor::of(text_of(body, ADMISSION)?);
        let (mut kind, mut api_version, mut request) = (Cow::default(), Cow::default(), None);
        let read = cursor.object(|key, value| {
            match key {
                "kind" => kind = value.string()?,
                "apiVersion" => api_version = value.string()?,
                "request" => request = Self::of(value, &mut take)?,
                _ => value.skip()?,
            }
            Ok(())
        });
        read.and_then(|_| cursor.end()).map_err(|error| format!("the body is no {ADMISSION}: {error}"))?;
        if kind != ADMISSION || api_version != ADMISSION_VERSION {
            return Err(format!("the body is no {ADMISSION} of {ADMISSION_VERSION}"));
        }
        let request = request.ok_or("the review has no request")?;
        if request.0.uid.is_empty() {
            return Err("the request has no uid".to_owned());
        }
        // It becomes a part of URLs, and anybody may send a review.
        if !request.0.namespace.is_empty() && !is_dns_label(&request.0.namespace) {
            return Err(format!("{} is not the name of a namespace", quoted(&request.0.namespace)));
        }
        Ok(request)
    }

    fn of<O>(
        cursor: &mut Cursor<'a>,
        mut take: impl FnMut(&mut Cursor<'a>) -> Result<O, Unreadable>,
    ) -> Result<Option<(Self, Objects<O>)>, Unreadable> {
        let (mut request, mut objects) = (Self::default(), Objects { new: None, old: None });
        let mut object = |cursor: &mut Cursor<'a>| match cursor.takes_null() {
            true => Ok(None),
            false => take(cursor).map(Some),
        };
        let read = cursor.object(|key, value| {
            match key {
                "uid" => request.uid = value.string()?,
                "operation" => request.operation = value.string()?,
                "name" => request.name = value.string()?,
                "namespace" => request.namespace = value.string()?,
                "subResource" => request.sub_resource = value.string()?,
                "kind" => request.version = version(value)?,
                "requestKind" => request.requested_version = version(value)?,
                "object" => objects.new = object(value)?,
                "oldObject" => objects.old = object(value)?,
                _ => value.skip()?,
            }
            Ok(())
        })?;
        Ok(read.map(|()| (request, objects)))
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
