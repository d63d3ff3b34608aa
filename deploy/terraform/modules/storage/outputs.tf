output "bucket" {
  description = "The bucket of STORAGE_URL."
  value       = aws_s3_bucket.objects.bucket
}

output "bucket_arn" {
  description = "For the machines' policy."
  value       = aws_s3_bucket.objects.arn
}

output "log_bucket" {
  description = "Where the balancer writes its log."
  value       = aws_s3_bucket.logs.bucket
}

output "cdn_domain" {
  description = "Where assets are served from."
  value       = aws_cloudfront_distribution.assets.domain_name
}
