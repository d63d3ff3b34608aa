# One key for everything at rest, one secret that machines read at their start: a JSON object of the settings that hold a
# password. Machines may read this one and no other.

data "aws_caller_identity" "current" {}

resource "aws_kms_key" "data" {
  description             = "${local.name}: databases, cache, objects, secrets, logs"
  enable_key_rotation     = true
  deletion_window_in_days = 30
  policy                  = data.aws_iam_policy_document.key.json
}

data "aws_iam_policy_document" "key" {
  # checkov:skip=CKV_AWS_109:the policy of a key names the key itself as *; without the account's root nobody could manage it
  # checkov:skip=CKV_AWS_111:see CKV_AWS_109
  # checkov:skip=CKV_AWS_356:see CKV_AWS_109
  statement {
    sid       = "Account"
    actions   = ["kms:*"]
    resources = ["*"]
    principals {
      type        = "AWS"
      identifiers = ["arn:aws:iam::${data.aws_caller_identity.current.account_id}:root"]
    }
  }

  statement {
    sid       = "LogsAndAlarms"
    actions   = ["kms:Encrypt*", "kms:Decrypt*", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:Describe*"]
    resources = ["*"]
    principals {
      type        = "Service"
      identifiers = ["logs.${var.region}.amazonaws.com", "cloudwatch.amazonaws.com", "cloudfront.amazonaws.com"]
    }
  }
}

resource "random_password" "application" {
  length  = 64
  special = false
}

resource "aws_secretsmanager_secret" "service" {
  # checkov:skip=CKV2_AWS_57:the database's password is rotated by RDS; the key that signs cursors has no rotation without downtime
  name       = local.name
  kms_key_id = aws_kms_key.data.arn
}

resource "aws_secretsmanager_secret_version" "service" {
  secret_id = aws_secretsmanager_secret.service.id
  secret_string = jsonencode({
    SECRET_KEY      = random_password.application.result
    DATABASE_URL    = module.database.url
    REPLICA_URLS    = join(",", module.database.replica_urls)
    REDIS_URL       = module.redis.url
    REDIS_CACHE_URL = module.cache.url
    SMTP_URL        = var.smtp_url
  })
}
