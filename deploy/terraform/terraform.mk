# What can be checked of deploy/terraform without an account. Included by the Makefile.

.PHONY: terraform-check

terraform-check: $(STAMP) ## Format and policies of deploy/terraform; needs terraform and a package index
	terraform fmt -recursive -check -diff deploy/terraform
	$(BIN)/uv tool run --quiet checkov@3.3.30 --directory deploy/terraform --framework terraform --quiet --compact --skip-download
