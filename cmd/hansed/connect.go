package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spf13/cobra"
)

// connectCommand joins standard input and output to the Unix socket of the hansed that runs with a configuration. `hanse --context` runs it in a pod: who may do that is then decided by
// the API server, and there is no port that would have to decide it again.
func connectCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "connect --config FILE",
		Short: "Join standard input and output to the socket of the hansed that runs here",
		Long: `Join standard input and output to the administration socket of the hansed that runs with FILE. It is what "hanse --context" runs in a pod of hansed,
by the API server's exec.`,
		Example:       "  kubectl -n hanse-system exec -i hansed-0 -- /hansed connect --config /etc/hanse/hansed.yaml",
		Args:          cobra.NoArgs,
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := LoadConfig(path)
			if err != nil {
				return err
			}
			return connect(cfg.Socket, cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&path, "config", "/etc/hanse/hansed.yaml", "its configuration `FILE`")
	return cmd
}

const connectTimeout = 5 * time.Second

// connect copies both ways until the socket's side ends, or in ends and the socket has answered all.
func connect(socket string, in io.Reader, out io.Writer) error {
	conn, err := net.DialTimeout("unix", socket, connectTimeout)
	if err != nil {
		return fmt.Errorf("hansed does not answer on its socket: %w", err)
	}
	defer conn.Close()
	go func() {
		_, _ = io.Copy(conn, in) // what ends it ends the other direction too
		_ = conn.(*net.UnixConn).CloseWrite()
	}()
	if _, err = io.Copy(out, conn); errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
