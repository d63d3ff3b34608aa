# A private bucket for invoices and assets. The CDN reads avatars/ and nothing else; invoices are fetched by links that the
# service signs for minutes.

resource "aws_s3_bucket" "objects" {
  # checkov:skip=CKV_AWS_144:a copy in another region belongs to the multi-region installation, docs/deployment/regions.md
  # checkov:skip=CKV2_AWS_62:nothing waits for events of objects: what is written is written by the service itself
  bucket_prefix = "${var.name}-objects-"
}

resource "aws_s3_bucket" "logs" {
  # checkov:skip=CKV_AWS_144:logs need no copy in another region
  # checkov:skip=CKV2_AWS_62:nothing waits for events of logs
  # checkov:skip=CKV_AWS_18:the log of the logs would log itself
  # checkov:skip=CKV_AWS_145:the load balancer can write its logs only with the bucket's own keys (SSE-S3)
  bucket_prefix = "${var.name}-logs-"
}

resource "aws_s3_bucket_public_access_block" "this" {
  for_each = { objects = aws_s3_bucket.objects.id, logs = aws_s3_bucket.logs.id }

  bucket                  = each.value
  block_public_acls       = true
  block_public_policy     = true
  ignore_public_acls      = true
  restrict_public_buckets = true
}

resource "aws_s3_bucket_versioning" "this" {
  for_each = { objects = aws_s3_bucket.objects.id, logs = aws_s3_bucket.logs.id }

  bucket = each.value

  versioning_configuration {
    status = "Enabled"
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "objects" {
  bucket = aws_s3_bucket.objects.id

  rule {
    bucket_key_enabled = true

    apply_server_side_encryption_by_default {
      sse_algorithm     = "aws:kms"
      kms_master_key_id = var.key_arn
    }
  }
}

resource "aws_s3_bucket_server_side_encryption_configuration" "logs" {
  bucket = aws_s3_bucket.logs.id

  rule {
    apply_server_side_encryption_by_default {
      sse_algorithm = "AES256"
    }
  }
}

# An avatar goes from a browser straight into the bucket, by a signed link; a browser asks first whether it may.
resource "aws_s3_bucket_cors_configuration" "objects" {
  bucket = aws_s3_bucket.objects.id

  cors_rule {
    allowed_methods = ["PUT", "GET"]
    allowed_origins = [var.origin]
    allowed_headers = ["content-type"]
    max_age_seconds = 3600
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "objects" {
  bucket = aws_s3_bucket.objects.id

  rule {
    id     = "leftovers"
    status = "Enabled"

    filter {}

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }

    noncurrent_version_expiration {
      noncurrent_days = 30
    }
  }
}

resource "aws_s3_bucket_lifecycle_configuration" "logs" {
  bucket = aws_s3_bucket.logs.id

  rule {
    id     = "old"
    status = "Enabled"

    filter {}

    expiration {
      days = 90
    }

    noncurrent_version_expiration {
      noncurrent_days = 1
    }

    abort_incomplete_multipart_upload {
      days_after_initiation = 1
    }
  }
}

resource "aws_s3_bucket_logging" "objects" {
  bucket        = aws_s3_bucket.objects.id
  target_bucket = aws_s3_bucket.logs.id
  target_prefix = "objects/"
}

data "aws_iam_policy_document" "objects" {
  statement {
    sid       = "CdnReadsAssets"
    actions   = ["s3:GetObject"]
    resources = ["${aws_s3_bucket.objects.arn}/avatars/*"]

    principals {
      type        = "Service"
      identifiers = ["cloudfront.amazonaws.com"]
    }

    condition {
      test     = "StringEquals"
      variable = "AWS:SourceArn"
      values   = [aws_cloudfront_distribution.assets.arn]
    }
  }
}

resource "aws_s3_bucket_policy" "objects" {
  bucket = aws_s3_bucket.objects.id
  policy = data.aws_iam_policy_document.objects.json
}

data "aws_iam_policy_document" "logs" {
  statement {
    sid       = "LogsOfBalancerAndBucket"
    actions   = ["s3:PutObject"]
    resources = ["${aws_s3_bucket.logs.arn}/*"]

    principals {
      type        = "Service"
      identifiers = ["logdelivery.elasticloadbalancing.amazonaws.com", "logging.s3.amazonaws.com"]
    }
  }
}

resource "aws_s3_bucket_policy" "logs" {
  bucket = aws_s3_bucket.logs.id
  policy = data.aws_iam_policy_document.logs.json
}

resource "aws_cloudfront_origin_access_control" "objects" {
  name                              = var.name
  origin_access_control_origin_type = "s3"
  signing_behavior                  = "always"
  signing_protocol                  = "sigv4"
}

# AWS's own policies, by the identities that its documentation gives them.
data "aws_cloudfront_cache_policy" "optimized" {
  name = "Managed-CachingOptimized"
}

data "aws_cloudfront_response_headers_policy" "security" {
  name = "Managed-SecurityHeadersPolicy"
}

resource "aws_cloudfront_distribution" "assets" {
  # checkov:skip=CKV_AWS_68:it serves immutable files of one bucket; there is no application behind it for a firewall to protect
  # checkov:skip=CKV2_AWS_47:see CKV_AWS_68
  # checkov:skip=CKV_AWS_310:one origin; a second belongs to the multi-region installation
  # checkov:skip=CKV_AWS_305:there is no page at the root
  # checkov:skip=CKV_AWS_374:customers are everywhere
  # checkov:skip=CKV_AWS_86:the objects' own access log has what is needed; edge logs would double it
  # checkov:skip=CKV2_AWS_42:under AWS's own name and certificate until a name of one's own is chosen
  # checkov:skip=CKV_AWS_174:AWS's own certificate decides the protocol, TLS 1.2 and newer by its current default
  enabled         = true
  is_ipv6_enabled = true
  comment         = "${var.name}: assets"

  origin {
    origin_id                = "objects"
    domain_name              = aws_s3_bucket.objects.bucket_regional_domain_name
    origin_access_control_id = aws_cloudfront_origin_access_control.objects.id
  }

  default_cache_behavior {
    target_origin_id           = "objects"
    viewer_protocol_policy     = "redirect-to-https"
    allowed_methods            = ["GET", "HEAD"]
    cached_methods             = ["GET", "HEAD"]
    compress                   = true
    cache_policy_id            = data.aws_cloudfront_cache_policy.optimized.id
    response_headers_policy_id = data.aws_cloudfront_response_headers_policy.security.id
  }

  restrictions {
    geo_restriction {
      restriction_type = "none"
    }
  }

  viewer_certificate {
    cloudfront_default_certificate = true
  }
}
