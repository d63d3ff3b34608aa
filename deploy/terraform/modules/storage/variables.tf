variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "key_arn" {
  description = "KMS key of the objects."
  type        = string
}

variable "origin" {
  description = "The page whose scripts may upload avatars straight into the bucket, such as https://shop.example."
  type        = string
}
