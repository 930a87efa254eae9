// Package main is every program of the test cluster in one binary: the name it is called by says which, so a symbolic
// link is a program. Linked once instead of seven times, it is built in half the time and takes a fifth of the disk.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	_ "time/tzdata" // CronJobs name time zones

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/etcdmain"
	_ "k8s.io/client-go/plugin/pkg/client/auth"
	"k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	_ "k8s.io/component-base/logs/json/register"
	_ "k8s.io/component-base/metrics/prometheus/clientgo"
	_ "k8s.io/component-base/metrics/prometheus/version"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
	apiserver "k8s.io/kubernetes/cmd/kube-apiserver/app"
	controllers "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	proxy "k8s.io/kubernetes/cmd/kube-proxy/app"
	scheduler "k8s.io/kubernetes/cmd/kube-scheduler/app"
	kubelet "k8s.io/kubernetes/cmd/kubelet/app"
)

var programs = map[string]func(){
	"etcd":                    server(func() { etcdmain.Main(os.Args) }),
	"kube-apiserver":          server(run(apiserver.NewAPIServerCommand)),
	"kube-controller-manager": server(run(controllers.NewControllerManagerCommand)),
	"kube-scheduler":          server(run(func() *cobra.Command { return scheduler.NewSchedulerCommand() })),
	"kube-proxy":              server(run(proxy.NewProxyCommand)),
	// The kubelet installs a signal context of its own, and a process may have only one.
	"kubelet": server(run(func() *cobra.Command { return kubelet.NewKubeletCommand(context.Background()) })),
	"kubectl": runKubectl,
	"certificates": func() {
		if err := writeCertificates(os.Stdin); err != nil {
			fail(err.Error())
		}
	},
}

func main() {
	name := filepath.Base(os.Args[0])
	program, known := programs[name]
	if !known {
		fail("there is no program " + name + " in here; call it by a link named kube-apiserver, kubectl, ...")
	}
	program()
}

// server ends the program when whoever started it is gone, however that went: the other end of the pipe closes. A
// signal at the parent's death would come too early where a thread of the parent started it and ended.
func server(program func()) func() {
	return func() {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin)
			os.Exit(1)
		}()
		program()
	}
}

// run makes the command only when it is asked for: each registers global flags that another one has too.
func run(command func() *cobra.Command) func() {
	return func() { os.Exit(cli.Run(command())) }
}

func runKubectl() {
	// Flags of logging are read before the command exists, because plugins are looked up while it is made.
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(os.Args))
	if err := cli.RunNoErrOutput(kubectl.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err)
	}
}

func fail(text string) {
	fmt.Fprintln(os.Stderr, text)
	os.Exit(2)
}
