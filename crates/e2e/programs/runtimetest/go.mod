module funtainer.invalid/runtimetest

go 1.19

require github.com/opencontainers/runtime-tools v0.9.0

require (
	github.com/hashicorp/go-multierror v1.1.1
	github.com/mndrix/tap-go v0.0.0-20171203230836-629fa407e90b
	github.com/opencontainers/runtime-spec v1.0.2
	github.com/opencontainers/selinux v1.3.3
	github.com/sirupsen/logrus v1.9.3
	github.com/syndtr/gocapability v0.0.0-20200815063812-42c35b437635
	github.com/urfave/cli v1.22.14
	golang.org/x/sys v0.13.0
)

replace github.com/opencontainers/runtime-spec => github.com/opencontainers/runtime-spec v1.0.2

replace github.com/opencontainers/selinux => github.com/opencontainers/selinux v1.3.3
