// Package main is kwok: it plays the nodes and pods of a cluster that has none. A module of its own, because it is made
// for another release of Kubernetes than the control plane's.
package main

import (
	"io"
	"os"

	"github.com/spf13/pflag"
	"sigs.k8s.io/kwok/pkg/config"
	"sigs.k8s.io/kwok/pkg/kwok/cmd"
	"sigs.k8s.io/kwok/pkg/log"
	"sigs.k8s.io/kwok/pkg/utils/signals"
)

func main() {
	go endWithInput()
	// kwok reads its logging and its configuration before its command exists, and from the same arguments.
	early := pflag.NewFlagSet("early", pflag.ContinueOnError)
	early.ParseErrorsWhitelist.UnknownFlags = true
	early.Usage = func() {}
	ctx, logger := log.InitFlags(signals.SetupSignalContext(), early)
	ctx, err := config.InitFlags(ctx, early)
	if err == nil {
		command := cmd.NewCommand(ctx)
		command.PersistentFlags().AddFlagSet(early)
		err = command.ExecuteContext(ctx)
	}
	if err != nil {
		logger.Error("kwok ends", err)
		os.Exit(1)
	}
}

// endWithInput ends the process when whoever started it is gone, however that went: the other end of the pipe closes.
func endWithInput() {
	_, _ = io.Copy(io.Discard, os.Stdin)
	os.Exit(1)
}
